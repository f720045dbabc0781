"""Keys and values of version 0.1 and of other programs are answered with those of today."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

from cmtmae_scale.config.finetune import Finetune, load_finetune
from cmtmae_scale.config.hints import HABITS, RENAMED, RENAMED_VALUES, VALUE_REMEDIES, key_hint
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.ranges import walk_fields
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import EXIT_CONFIG, ConfigError
from cmtmae_scale.runtime.arguments import Parser

KEYS = {
    load_config: {key: one.type for key, one in walk_fields(Config)},
    load_finetune: {key: one.type for key, one in walk_fields(Finetune)},
}
TREE: dict[str, Any] = {
    "run": {"output_dir": "runs/x"},
    "data": {"path": "photos", "test_path": "test"},
    "train": {"steps": 10},
}
Load = Callable[..., Any]
each_task = pytest.mark.parametrize("load", KEYS)


def answers(load: Load, folder: Path, key: str, value: str) -> list[str]:
    """The errors that a key causes as an override and in a file."""
    recipe = folder / "recipe.yaml"
    tree: dict[str, Any] = {group: dict(keys) for group, keys in TREE.items()}
    if load is load_config:
        del tree["data"]["test_path"]
    recipe.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as by_override:
        load(recipe, [f"{key}={value}"])
    group, _, name = key.rpartition(".")
    (tree.setdefault(group, {}) if group else tree)[name] = yaml.safe_load(value)
    recipe.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as in_file:
        load(recipe)
    return [str(by_override.value), str(in_file.value)]


@each_task
@pytest.mark.parametrize(
    ("table", "hint"), [(RENAMED, "it is now {}"), (HABITS, "did you mean {}?")]
)
def test_an_old_or_foreign_key_is_answered(
    load: Load, table: Mapping[str, str], hint: str, tmp_path: Path
) -> None:
    for old, new in table.items():
        for answer in answers(load, tmp_path, old, "1"):
            assert (hint.format(new) in answer) == (new in KEYS[load]), (old, answer)


@each_task
def test_an_old_value_is_answered(load: Load, tmp_path: Path) -> None:
    for (key, old), new in RENAMED_VALUES.items():
        if key in KEYS[load]:
            for answer in answers(load, tmp_path, key, old):
                assert f"{key}={old!r} is not one of" in answer
                assert answer.endswith(f"; {old!r} was renamed to {new!r}")


def test_a_foreign_value_is_answered(tmp_path: Path) -> None:
    for (key, old), remedy in VALUE_REMEDIES.items():
        for answer in answers(load_config, tmp_path, key, old):
            assert answer.endswith(remedy)


def test_hints_name_keys_and_values_of_today() -> None:
    known = KEYS[load_config] | KEYS[load_finetune]
    assert {*RENAMED.values(), *HABITS.values()} <= known.keys()
    assert not {*RENAMED, *HABITS} & known.keys()
    for (key, old), new in RENAMED_VALUES.items():
        assert get_origin(known[key]) is Literal
        assert new in get_args(known[key]) and old not in get_args(known[key])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--lr", "1e-3"], "--lr: settings are key=value; did you mean optimizer.base_lr?"),
        (["--batch-size=64"], "did you mean train.global_batch_size?"),
        (["--batch_size", "64"], "did you mean train.global_batch_size?"),
        (["--train.global_batch", "64"], "it is now train.global_batch_size"),
        (["--mask.ratio=0.5"], "settings are key=value; drop the dashes: mask.ratio=0.5"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_an_option_of_other_programs_is_answered(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser(allow_abbrev=False, hint=key_hint)
    parser.add_argument("overrides", nargs="*")
    with pytest.raises(SystemExit) as exited:
        parser.parse_intermixed_args(arguments)
    assert exited.value.code == EXIT_CONFIG
    assert expected in capsys.readouterr().err
