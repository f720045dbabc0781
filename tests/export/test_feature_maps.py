"""Exported weights give timm's users the feature maps of the student's blocks, and detectors."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from cmtmae_scale.export.origin import Origin
from cmtmae_scale.export.timm_folder import reads_folders, write_timm
from cmtmae_scale.method.build import timm_options
from cmtmae_scale.method.student import Student
from tests.export.test_architectures import saved

SIDE, SIZES = 16, {"width": 48, "depth": 2, "heads": 2}
ARCHS = ["deit_tiny_patch16_224", "vit_base_patch16_dinov3", "eva02_base_patch14_224"]


def exported(folder: Path, arch: str, size: int) -> Origin:
    origin = saved(folder, arch, size, SIDE, **SIZES)
    (folder / "x").mkdir()
    write_timm(folder / "x", origin)
    return origin


def block_maps(student: Student, images: Tensor) -> list[Tensor]:
    """The patches' outputs of each block, one after the other, ``[B, D, h, w]``."""
    x, maps = student.embed(images), []
    for block, rotary in zip(student.blocks, student.rotary_tables(), strict=True):
        x = block(x, *rotary)
        maps.append(x[:, student.num_prefix :].mT.unflatten(2, student.grid))
    return maps


@torch.no_grad()
@pytest.mark.parametrize("arch", ARCHS)
def test_timms_feature_maps_are_the_outputs_of_the_students_blocks(
    arch: str, tmp_path: Path
) -> None:
    origin = exported(tmp_path, arch, 48)
    file = tmp_path / "x" / "model.safetensors"
    call = timm_options(origin.config) | {"pretrained_cfg_overlay": {"file": str(file)}}
    cases: list[tuple[str, int, dict[str, Any]]] = [(arch, 80, call | {"img_size": 80})]
    if reads_folders():
        place = f"local-dir:{tmp_path / 'x'}"
        cases += [(place, 48, {}), (place, 80, {"dynamic_img_size": True})]
    for name, size, options in cases:
        encoder: Any = timm.create_model(
            name, pretrained=True, features_only=True, out_indices=[0, -1], **options
        ).eval()
        assert encoder.feature_info.channels() == [48, 48]
        assert encoder.feature_info.reduction() == [SIDE, SIDE]
        images = torch.randn(2, 3, size, size, generator=torch.manual_seed(0))
        origin.config.views.image_size = size
        ours = block_maps(origin.encoder(), images)
        for found, expected in zip(encoder(images), ours, strict=True):
            scale = float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)


def shapes(count: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images of noise with one bright rectangle each, and its box, label and mask."""
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for number in range(count):
        image = 0.3 * torch.rand(3, 96, 128, generator=generator)
        left, top = 8 + 12 * number, 6 + 10 * number
        mask = torch.zeros(1, 96, 128, dtype=torch.uint8)
        mask[:, top : top + 40, left : left + 48] = 1
        images.append(image + 0.6 * mask)
        box = torch.tensor([[left, top, left + 48, top + 40]]).float()
        targets.append({"boxes": box, "labels": torch.ones(1).long(), "masks": mask})
    return images, targets


@pytest.mark.slow
@pytest.mark.skipif(not reads_folders(), reason="this timm reads no such folder")
@pytest.mark.parametrize("arch", ARCHS[:2])
def test_the_detector_of_the_docs_learns_on_the_exported_encoder(arch: str, tmp_path: Path) -> None:
    exported(tmp_path, arch, 64)
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    (block,) = re.findall(r"```python\n(# detect\.py\n.*?)```", text, re.DOTALL)
    block = block.replace("FOLDER", str(tmp_path / "x"))
    small = "num_classes=2, min_size=96, max_size=128, box_batch_size_per_image=32)"
    block = block.replace("num_classes=2)", small)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(block, names)
    images, targets = shapes(2)
    names["model"].train()
    sums = []
    for _ in range(7):
        losses = names["train_step"](images, targets)
        assert len(losses) == 5 and all(math.isfinite(value) for value in losses.values())
        sums.append(sum(losses.values()))
    assert sum(sums[-2:]) < 0.9 * sum(sums[:2])
    gradients = {name: p.grad for name, p in names["encoder"].named_parameters()}
    patches = next(value for name, value in gradients.items() if "patch_embed" in name)
    assert patches is not None and float(patches.abs().max()) > 0
