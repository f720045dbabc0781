"""Which processes count as launchers, whose death stops the ranks below them."""

import pytest

from cmtmae_scale.runtime.processes import names_launcher


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
