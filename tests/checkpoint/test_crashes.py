"""A save may end at any operation: the next launch always finds a whole checkpoint."""

import errno
from pathlib import Path

import pytest

from tests.checkpoint.save_case import SCENARIOS, crash_everywhere, refuse_everywhere
from tests.processes import run_ranks

pytestmark = pytest.mark.gloo
RARE = ("over a broken one", "over an older one")
MOST = [pytest.param(name, marks=pytest.mark.slow) if name in RARE else name for name in SCENARIOS]


@pytest.mark.parametrize("scenario", MOST)
def test_a_crash_at_any_file_operation_leaves_a_loadable_state(
    tmp_path: Path, scenario: str
) -> None:
    (total,) = run_ranks(1, crash_everywhere, tmp_path, scenario)
    print(f"{scenario}: killed, and lost power, at each of {total} file operations")
    assert total >= 25


@pytest.mark.parametrize("scenario", MOST)
@pytest.mark.parametrize(
    ("code", "stays"), [(errno.ENOSPC, False), (errno.EDQUOT, True)], ids=["once", "from then on"]
)
def test_a_refused_file_operation_costs_one_warning_and_no_checkpoint(
    tmp_path: Path, scenario: str, code: int, stays: bool
) -> None:
    (total,) = run_ranks(1, refuse_everywhere, tmp_path, scenario, code, stays)
    print(f"{scenario}: refused at each of {total} file operations")
    assert total >= 25
