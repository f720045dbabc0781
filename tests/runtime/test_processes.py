"""Which processes count as launchers, whose death stops the ranks below them; odd names."""

import os
import subprocess
from pathlib import Path

import pytest

from cmtmae_scale.runtime.processes import descendants, names_launcher, start_ticks


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/x/bin/python3", "launchers/study.py", "configs/studies/cpu.yaml"], True),
        (["python", "/x/bin/cmtmae", "study", "configs/studies/cpu.yaml"], True),
        (["python", "-m", "cmtmae_scale", "supervise", "--", "torchrun"], True),
        (["python", "/x/bin/torchrun", "launchers/pretrain.py"], True),
        (["python", "/x/bin/cmtmae", "pretrain", "--config", "study.yaml"], False),
        (["python", "sweep.py", "study"], False),
        (["bash", "-c", "study.py"], False),
    ],
)
def test_a_launcher_is_told_by_its_command_line(words: list[str], expected: bool) -> None:
    assert names_launcher(words) == expected


def test_processes_of_any_name_are_found(tmp_path: Path) -> None:
    program = tmp_path / "\u043e\u0431\u0443\u0447\u0435\u043d\u0438\u0435.sh"
    program.write_text("#!/bin/sh\nread line\n")
    program.chmod(0o755)
    with subprocess.Popen([program], stdin=subprocess.PIPE) as child:
        try:
            assert b"\xd0)" in Path(f"/proc/{child.pid}/stat").read_bytes()  # half a character
            assert start_ticks(child.pid) is not None
            assert child.pid in descendants(os.getpid())
        finally:
            child.kill()
