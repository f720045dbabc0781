"""How the process of a rank ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from cmtmae_scale.errors import EXIT_CRASH, EXIT_DONE, EXIT_STOPPED
from cmtmae_scale.runtime.exit_code import ExitReport

ROOT = Path(__file__).parents[2]
CODE = """
import atexit, sys
import torch.distributed as dist
from cmtmae_scale.commands.rank import run_as_rank
from cmtmae_scale.errors import ConfigError

def launch():
    if OPEN:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    raise ERROR

atexit.register(print, "the interpreter ended")
sys.exit(run_as_rank(launch))
"""


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [("MemoryError('no room')", 1, "MemoryError: no room"), ("ConfigError('a=1')", 78, "a=1")],
)
@pytest.mark.parametrize("is_open", [True, False])
def test_the_interpreter_destroys_no_group_of_a_rank_that_failed(
    error: str, code: int, text: str, is_open: bool
) -> None:
    script = CODE.replace("ERROR\n", f"{error}\n").replace("OPEN", str(is_open))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code and text in done.stderr
    assert ("the interpreter ended" in done.stdout) != is_open


@pytest.mark.parametrize(
    ("code", "crashed"), [("", True), (EXIT_CRASH, True), (EXIT_DONE, False), (EXIT_STOPPED, False)]
)
def test_a_rank_knows_of_another_that_crashed(
    tmp_path: Path, code: int | str, crashed: bool
) -> None:
    """Ranks that cannot connect exit with code 1, and the launcher ends the others with SIGTERM."""
    with subprocess.Popen(["true"]) as other:
        other.wait()
    (tmp_path / str(other.pid)).write_text(str(code))
    assert ExitReport(str(tmp_path)).finds_dead_rank() == crashed
