"""The first twenty losses of four tiny recipes equal those that are stored beside this file.

A change of what a run computes fails here. Where it is intended, write the new losses:

    python -m tests.engine.test_golden_losses
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.engine.run_case import BASE, read_losses, run
from tests.finetuning import finetune_case
from tests.processes import run_ranks

STORED = Path(__file__).with_name("golden_losses.json")
TOLERANCE = dict.fromkeys(("cmt_mae", "cmt_mae_hide", "mae"), 2e-4) | {"fine-tuning": 5e-3}
"""Relative. Kernels differ between versions of torch; in fine-tuning AdamW amplifies rounding of
the small gradients behind a head that starts near zero (2e-3 between torch 2.11 and 2.15)."""
MAE = {
    "mask": {"sampler": "random"},
    "teacher": {"mode": "none"},
    "decoder": BASE["decoder"] | {"type": "full"},
    "loss": {"teacher": 0, "student": 0, "pixel": 1, "tokens": "masked", "include_cls": False},
}
HIDE = {
    "mask": {"sampler": "hide_salient_mix", "salient_fraction": 0.5, "masks_per_view": 2},
    "decoder": BASE["decoder"] | {"type": "cross", "predict_ratio": 0.25},
    "loss": {"type": "smooth_l1", "tokens": "masked", "include_cls": False},
}
# RandAugment's kernels round differently between versions of torchvision.
TUNE = finetune_case.BASE | {"augment": {"magnitude": None, "erase": 0.0}}
RECIPES = {"cmt_mae": {}, "cmt_mae_hide": HIDE, "mae": MAE, "fine-tuning": None}


def write_images(folder: Path, seed: int) -> str:
    """Twenty lossless images of coloured blocks, the same whatever library decodes them."""
    generator = np.random.default_rng(seed)
    for number in range(20):
        place = folder / f"class{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        blocks = generator.integers(0, 256, (5 + number % 3, 6, 3), dtype=np.uint8)
        image = blocks.repeat(16, axis=0).repeat(16, axis=1)
        Image.fromarray(image).save(place / f"{number:03d}.png")
    return str(folder)


def first_losses(name: str, folder: Path) -> list[float]:
    changes = RECIPES[name]
    images = write_images(folder / "images", 0)
    data = {"workers": 2, "path": images, "decode": "torch"}
    if changes is None:
        finetune_case.write_encoder(folder / "encoder.safetensors", 0)
        data["test_path"] = write_images(folder / "test", 1)
    tree = (TUNE if changes is None else BASE | changes) | {
        "run": {"output_dir": str(folder / "run")},
        "data": data,
        "train": {"global_batch_size": 8, "micro_batch_size": 4, "steps": 20},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    assert run_ranks(1, run, recipe, ["checkpoint.every=100"]) == [None]
    return read_losses(folder / "run")


@pytest.mark.gloo
@pytest.mark.parametrize("name", RECIPES)
def test_losses_equal_the_stored_losses(name: str, tmp_path: Path) -> None:
    found = first_losses(name, tmp_path)
    assert len(found) == 20
    assert found == pytest.approx(json.loads(STORED.read_text())[name], rel=TOLERANCE[name])


if __name__ == "__main__":
    losses = {}
    for each in RECIPES:
        with tempfile.TemporaryDirectory() as place:
            losses[each] = first_losses(each, Path(place))
    STORED.write_text(json.dumps(losses, indent=1) + "\n")
