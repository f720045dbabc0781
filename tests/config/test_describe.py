"""``cmtmae config`` and ``docs/config.md`` are generated from the schema, and are complete."""

import itertools
from pathlib import Path

import pytest

from cmtmae_scale.commands.config import config_page, describe_config
from cmtmae_scale.config.describe import TASKS, find_uses, list_groups
from cmtmae_scale.config.ranges import walk_fields
from cmtmae_scale.config.schema import NamedTeacher, Schedule
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_DONE

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    task: {key.name: key for group in list_groups(schema) for key in group.keys}
    for task, schema in TASKS.items()
}


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == config_page(), "run: cmtmae config --markdown > docs/config.md"


@pytest.mark.parametrize("task", TASKS)
def test_every_key_is_described(task: str) -> None:
    entries = [f"teachers.NAME.{name}" for name, _ in walk_fields(NamedTeacher)]
    named = (entries if name == "teachers" else [name] for name, _ in walk_fields(TASKS[task]))
    assert list(KEYS[task]) == [*itertools.chain.from_iterable(named)]
    page = config_page()
    for key in KEYS[task].values():
        assert len(key.meaning) > 5 and key.values and key.default, key
        assert f"| `{key.name}` | {key.meaning}" in page


def described(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert describe_config(arguments) == EXIT_DONE
    return capsys.readouterr().out


def test_a_key_is_described_with_its_uses(capsys: pytest.CaptureFixture[str]) -> None:
    text = described(capsys, "mask.ratio")
    assert text.startswith("pre-training:\n\nmask.ratio\n  Share of patches masked.\n")
    assert "  takes    number; must lie in (0, 1)\n  default  0.75\n" in text
    assert "method/masking.py" in text.split("used in")[1]
    assert "schedule" not in text
    text = described(capsys, "mask.salient_fraction")
    assert all(f"{name}: " in text for name, _ in walk_fields(Schedule))
    assert "default  {kind: linear, start: 0, end: 0.5}" in text
    text = described(capsys, "run.output_dir")
    assert text.startswith("pre-training and fine-tuning:\n") and "default  required" in text
    text = described(capsys, "optimizer.betas")
    assert text.count("optimizer.betas\n") == 2 and "[0.9, 0.999]" in text


def test_a_module_may_read_a_key_of_a_group_that_is_passed_to_it() -> None:
    keys = KEYS["pre-training"]
    assert find_uses(keys["guard.spike_factor"]) == ["engine/skips.py"]
    assert find_uses(keys["attention.temperature"]) == ["method/attention.py"]
    assert "method/masking.py" in find_uses(keys["mask.temperature"])


def test_a_group_lists_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    text = described(capsys, "target")
    for name in ("target.teacher.norm", "target.student.layers", "target.pixel.norm"):
        assert f"\n{name}\n" in text
    assert "used in" not in text
    text = described(capsys)
    for schema in TASKS.values():
        assert all(f"  {group.name} " in text for group in list_groups(schema))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lr", "did you mean optimizer.base_lr?"),
        ("run.dir", "it is now run.output_dir"),
        ("ratio", "did you mean mask.ratio?"),
        ("path", "did you mean data.path?"),
        ("mask.ratoi", "did you mean mask.ratio?"),
        ("optimiser", "did you mean optimizer?"),
        ("xyzzy", "cmtmae config lists the groups"),
        ("", "cmtmae config lists the groups"),
    ],
)
def test_an_unknown_key_is_answered(
    name: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert describe_config([name]) == EXIT_CONFIG
    error = f"{name} is neither a key nor a group of a recipe; {expected}\n"
    assert capsys.readouterr() == ("", error)
