"""Run a command as one rank of many: its signals and its exit code."""

import logging
import os
import sys
import traceback
from collections.abc import Callable

from cmtmae_scale.engine.stop import LaunchInterrupted, interrupt_launch
from cmtmae_scale.errors import EXIT_CRASH, EXIT_DONE, EXIT_STOPPED, CmtMaeError, exit_code_of
from cmtmae_scale.runtime.exit_code import report_exit
from dataloading.errors import DataError

logger = logging.getLogger(__name__)


def run_as_rank(launch: Callable[[], int]) -> int:
    """Run one launch as a rank, and turn every outcome into the exit code of this process.

    The exit code is what ``launch`` returns, but 0 for a requested stop under torchrun, which
    treats every other code as a crash. Where a failure leaves a process group open
    (``process_group``), the process exits here, because the interpreter would destroy the group.
    """
    was_open = has_group()  # then the group is the caller's, who destroys it
    try:
        code = report_outcome(launch)
    except Exception:
        if was_open or not has_group():
            raise
        traceback.print_exc()
        code = EXIT_CRASH
    if has_group() and not was_open:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def has_group() -> bool:
    """Return whether there is a process group, without importing torch."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def report_outcome(launch: Callable[[], int]) -> int:
    """Run a launch, log what ended it, and report its exit code; see ``run_as_rank``."""
    interrupt_launch()
    with report_exit() as report:
        try:
            code = launch()
        except LaunchInterrupted as stopped:
            # torchrun and deepspeed send SIGTERM to all ranks also when one of them has died.
            if report.finds_dead_rank():
                logger.error("stopped (%s): another rank on this machine has died", stopped)
                code = EXIT_CRASH
            else:
                logger.info("stopped (%s) with nothing to save; the same command restarts", stopped)
                code = EXIT_STOPPED
        except (CmtMaeError, DataError) as error:
            logger.error("%s", error)
            code = exit_code_of(error)
        report.leave(code)
    return EXIT_DONE if code == EXIT_STOPPED and "TORCHELASTIC_RUN_ID" in os.environ else code
