"""Run a command as one process: its errors and its exit code."""

import logging
from collections.abc import Callable

from cmtmae_scale.errors import EXIT_STOPPED, CmtMaeError, describe_store, exit_code_of, may_pass
from dataloading.errors import DataError

logger = logging.getLogger(__name__)


def run_alone(
    command: Callable[[], int],
    show: Callable[[str], object] = lambda text: logger.error("%s", text),
) -> int:
    """Run a command, and turn an error that the user can fix into one line and its exit code.

    The code is 75 for a store that is full, over quota or failing, wherever the command writes: the
    same command works once the store works again.

    Args:
        command: returns the exit code.
        show: shows the line of an error.
    """
    try:
        return command()
    except (CmtMaeError, DataError) as error:
        show(str(error))
        return exit_code_of(error)
    except OSError as error:
        if not may_pass(error):
            raise
        show(str(describe_store(error, "where the command writes")))
        return EXIT_STOPPED
