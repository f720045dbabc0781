"""The real ViT-S/14 and a teacher with random weights, together: online, cached, and drawn.

``python -m pytest -s -m slow tests/teachers/test_several_real.py`` prints losses and the figure.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file

from tests.pretraining.cached_run_case import Seen, observe
from tests.processes import run_ranks
from tests.teachers.cases import real_teacher

pytestmark = [pytest.mark.slow, pytest.mark.gloo]
STEPS, NAMES = 10, ("dino", "random")
VIT = {"library": "timm", "feature": "ln_post"}
TREE: dict[str, Any] = {
    "data": {"workers": 1},
    "views": {"image_size": 64, "views_per_image": 1},
    "student": {"arch": "vit_tiny_patch16_224", "patch_size": 8, "width": 128, "depth": 4}
    | {"heads": 4},
    "decoder": {"depth": 1, "width": 128, "heads": 4},
    "target": {"teacher": {"norm": "channel"}, "student": {"norm": "instance"}},
    "collaboration": {"alpha_attention": 0.5, "alpha_target": 0.7},
    "momentum": {"start": 0.99},
    "optimizer": {"base_lr": 4.0e-3, "warmup_fraction": 0.1},
    "train": {"global_batch_size": 16, "micro_batch_size": 16, "steps": STEPS},
    "backend": {"precision": "fp32"},
    "checkpoint": {"every": STEPS},
    "log": {"every": 1, "images_every": STEPS},
}


def write_recipe(folder: Path, images: Path, weights: Path) -> Path:
    dino = VIT | {"name": "dino", "model": "vit_small_patch14_dinov2", "depth": 10}
    untrained = VIT | {"name": "random", "model": "vit_tiny_patch16_224", "weights": "random"}
    tree = TREE | {
        "run": {"output_dir": str(folder / "run")},
        "data": TREE["data"] | {"path": str(images)},
        "teachers": [dino | {"weights": str(weights)}, untrained | {"loss": 0.5}],
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def try_both(recipe: Path) -> dict[str, Seen]:
    from cmtmae_scale.commands.precompute import precompute_teacher

    folder = recipe.parent
    found = {"online": observe(recipe, folder / "online", [])}
    for codec in ("bf16", "int8"):
        own = [f"cache.dir={folder / codec}", f"cache.codec={codec}"]
        for name in NAMES:
            words = ["--config", str(recipe), "--teacher", name, "--rows-per-shard", "64", *own]
            assert precompute_teacher(words) == 0
        modes = [f"teachers.{name}.mode=cached" for name in NAMES]
        found[codec] = observe(recipe, folder / codec / "run", [*own, *modes])
    return found


def test_cached_and_online_agree_within_the_codec(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    default = Path(__file__).parents[2].parent / "shared" / "data"
    tars = Path(os.environ.get("CMTMAE_TEST_DATA", default)) / "imagenette-224"
    save_file(real_teacher()[0], tmp_path / "dino.safetensors")
    images = tars / "imagenette-224-val-000.tar"
    recipe = write_recipe(tmp_path, images, tmp_path / "dino.safetensors")
    (found,) = run_ranks(1, try_both, recipe, timeout_s=900)
    terms = ("loss/total", "loss/teacher_dino", "loss/teacher_random")
    rows = {
        name: [[entry[term] for term in terms] for entry in seen.log if "loss/total" in entry]
        for name, seen in found.items()
    }
    agreement = [e["attention/teacher_agreement"] for e in found["online"].log if "lr" in e]
    with capsys.disabled():
        for name, losses in rows.items():
            sys.stdout.write(f"\n{name}: step {STEPS}: {losses[-1]}")
        (figure, *_) = (tmp_path / "online" / "figures").glob("*.png")
        sys.stdout.write(f"\nagreement of the teachers' maps {agreement}\n{figure}\n")
    for codec in ("bf16", "int8"):
        assert found[codec].error == ""
        for online, cached in zip(rows["online"], rows[codec], strict=True):
            assert cached == pytest.approx(online, rel=0.01)
