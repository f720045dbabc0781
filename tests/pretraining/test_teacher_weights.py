"""A run continues with the files of its teachers' weights that it began with."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.pretraining.teacher_weights import compare_weights
from cmtmae_scale.teachers.build import build_teacher
from tests.engine.run_case import run, write_recipe
from tests.pretraining.several_case import build_cache, write_several
from tests.processes import run_ranks
from tests.teachers.cases import timm_config

pytestmark = pytest.mark.gloo


def write_weights(file: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    save_file(timm.create_model("test_vit", num_classes=0, img_size=64).state_dict(), file)
    return file


def resume(recipe: Path, file: Path, settings: list[str], *launches: list[str]) -> list[str]:
    """Train two steps; then launch again, with another file in the place of the first."""
    run(recipe, [*settings, "train.stop_after=2"])
    write_weights(file, 1)
    found: list[str] = []
    for number, overrides in enumerate(launches):
        try:
            stop = f"train.stop_after={3 + number}"
            found.append(str(run(recipe, [*settings, *overrides, stop])))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def state_of(run_dir: Path) -> dict[str, Any]:
    newest = max((run_dir / "checkpoints").glob("step-*"))
    return json.loads((newest / "state.json").read_text())


def test_another_file_in_the_place_of_the_teachers_is_refused(tmp_path: Path) -> None:
    recipe, file = write_recipe(tmp_path, depth=1), write_weights(tmp_path / "t.safetensors", 0)
    settings = [f"teacher.weights={file}"]
    allowed = ["run.allow_change=[teacher.weights]"]
    (found,) = run_ranks(1, resume, recipe, file, settings, [], allowed, [])
    assert found[0].startswith("ConfigError: teacher.weights: the SHA-256 of the weights is ")
    assert "run.allow_change=[teacher.weights]" in found[0]
    # The permitted file is the run's own from then on.
    assert found[1:] == ["train.stop_after=4", "train.stop_after=5"]


def test_each_of_several_teachers_and_a_cache_are_compared(tmp_path: Path) -> None:
    recipe, file = write_several(tmp_path), write_weights(tmp_path / "t.safetensors", 0)
    own = [f"teachers.second.weights={file}", "views.views_per_image=2", "cache.codec=bf16"]
    cache = [*own, f"cache.dir={tmp_path / 'cache'}"]
    (code,) = run_ranks(1, build_cache, recipe, cache, "second")
    assert code == 0
    cached = [
        "teachers.second.mode=cached",
        f"teachers.second.cache_dir={tmp_path / 'cache/second'}",
    ]
    (found,) = run_ranks(1, resume, recipe, file, [*own, *cached, "cache.on_miss=stop"], [])
    assert "weights_sha256" in found[0]  # the cache is of the file that was there
    assert list(state_of(tmp_path / "run")["teacher_weights"]) == ["second"]
    online = ["teachers.second.mode=online"]
    (found,) = run_ranks(1, resume_as_it_is, recipe, [*own, *online])
    assert found.startswith("ConfigError: teachers.second.weights: the SHA-256 of the weights is ")


def resume_as_it_is(recipe: Path, settings: list[str]) -> str:
    try:
        return str(run(recipe, settings))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_weights_that_are_drawn_at_random_have_no_file(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, depth=1)
    run_ranks(1, run, recipe, ["train.stop_after=2"])
    assert state_of(tmp_path / "run")["teacher_weights"] == {}


def test_a_factory_that_returns_other_weights_is_refused() -> None:
    settings: dict[str, Any] = {"library": "python", "weights": None, "feature": "block"}
    config = timm_config("tests.teachers.own_teacher:make_own_teacher", 64, 16, **settings)

    def compare(saved: dict[str, Any] | None) -> dict[str, Any]:
        teacher = build_teacher(config, "cpu", torch.float32)
        assert teacher is not None
        return compare_weights(config, {"": teacher}, saved)

    saved = compare(None)
    assert compare(saved) == saved
    config.run.seed += 1  # the factory draws its weights
    with pytest.raises(ConfigError, match=r"^teacher.weights: the SHA-256 of the weights is "):
        compare(saved)
    config.run.allow_change = ["teacher.weights"]
    assert compare(saved) != saved
