"""Recipes are found by a path or by a shipped name, from any working folder."""

from pathlib import Path

import pytest

from cmtmae_scale.config import shipped
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.shipped import STUDIES, find_recipe, shipped_names
from cmtmae_scale.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def refusal(text: str, folder: str = "configs") -> str:
    with pytest.raises(ConfigError) as raised:
        find_recipe(text, folder)
    return str(raised.value)


def test_a_recipe_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder is no recipe
    assert find_recipe("demo") == ROOT / "configs/demo.yaml"
    assert find_recipe("smoke", STUDIES) == ROOT / "configs/studies/smoke.yaml"
    config = load_config("demo", ["run.seed=3"])
    assert (config.run.seed, config.data.path) == (3, "datasets/demo/photos")  # as in the file


def test_a_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("run: {output_dir: mine}\n")
    assert find_recipe("demo") == Path("demo")


def test_a_copy_that_was_edited_wins_over_the_shipped_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/demo.yaml").write_text("")
    assert find_recipe("demo") == Path("configs/demo.yaml")


def test_what_is_not_there_is_answered_with_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ", ".join(shipped_names())
    end = f"ive a path, or one of: {names}"
    hint = "did you mean the shipped recipe vit_base? G"
    assert refusal("vit_bas") == f"vit_bas: neither a file nor a shipped recipe; {hint}{end}"
    place = "configs/vit_base.yaml"
    assert refusal(place) == f"{place}: no such file; {hint}{end}"
    assert refusal("x.yaml") == f"x.yaml: no such file; g{end}"
    studies = "cpu, cpu_finetune, cpu_no_decoder, first, pilot, smoke"
    assert refusal("smok", STUDIES).endswith(f"study smoke? Give a path, or one of: {studies}")
    for odd in ("", "a\0b", "n" * 300, "../demo", str(tmp_path)):
        assert refusal(odd).endswith(end)


def test_a_file_beside_it_or_the_command_for_a_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    command = "is a folder; if it holds images, cmtmae init photos/ writes a recipe; else give a "
    assert refusal("photos/").startswith(f"photos/: {command}")
    (tmp_path / "photos.yaml").write_text("")
    for wrong in ("photos", "photo.yaml", "photos.yml"):
        assert "did you mean photos.yaml? Give a path" in refusal(wrong)
    assert f"did you mean {tmp_path}/photos.yaml?" in refusal(f"{tmp_path}/photo.yaml")


def test_a_wheel_holds_them_inside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "cmtmae_scale" / "shipped" / "configs"
    inside.mkdir(parents=True)
    (inside / "own.yaml").write_text("")
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "cmtmae_scale")
    assert shipped_names() == ["own"]
    assert find_recipe("own") == inside / "own.yaml"
