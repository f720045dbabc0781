"""Files under the names of their first publication are teachers and initial weights."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch

from cmtmae_scale.checkpoint.init_weights import load_init_weights
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError, TeacherError
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.teachers.weights import map_weights
from tests.pretraining.test_students import SIDE, images, make_config
from tests.teachers import families  # noqa: F401 - registers the small networks with timm
from tests.teachers.cases import build, random_images, timm_config
from tests.teachers.published import State, as_clip, as_dinov2, as_dinov3
from tests.teachers.test_timm import normalised

WIDTH, DEPTH = 96, 2


class Published(NamedTuple):
    """A publication of one of timm's architectures."""

    arch: str
    rename: Callable[[State], State]
    unused: tuple[str, ...]
    """Parts of the names that no model of timm has."""


PUBLISHED = {
    "DINOv3": Published(
        "vit_base_patch16_dinov3",
        lambda s: as_dinov3(s, WIDTH, DEPTH),
        ("mask_token", "periods", "local_cls_norm", "qkv.bias"),
    ),
    "DINOv3, biases": Published(
        "vit_base_patch16_dinov3_qkvb",
        lambda s: as_dinov3(s, WIDTH, DEPTH),
        ("mask_token", "periods", "local_cls_norm", "bias_mask"),
    ),
    "DINOv3, 7B": Published(
        "vit_7b_patch16_dinov3",
        lambda s: as_dinov3(s, WIDTH, DEPTH),
        ("mask_token", "periods", "local_cls_norm", "qkv.bias"),
    ),
    "DINOv2": Published("vit_base_patch14_dinov2", lambda s: as_dinov2(s, WIDTH), ("mask_token",)),
    "DINOv2, registers": Published(
        "vit_giant_patch14_reg4_dinov2", lambda s: as_dinov2(s, WIDTH), ("mask_token",)
    ),
    "CLIP": Published("vit_base_patch16_clip_224", as_clip, ()),
    "PE": Published("vit_pe_core_base_patch16_224", as_clip, ()),
}


def build_theirs(arch: str, side: int = SIDE) -> Any:
    """timm's model of ``side`` x ``side`` patches of 8 pixels with random values."""
    theirs = timm.create_model(
        arch,
        num_classes=0,
        img_size=8 * side,
        patch_size=8,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=2,
        global_pool="token",
    )
    generator = torch.manual_seed(side)
    for parameter in theirs.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return theirs.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_students_initial_weights_are_the_published_ones(name: str, tmp_path: Path) -> None:
    published = PUBLISHED[name]
    theirs, model = build_theirs(published.arch), CollaborativeMAE(make_config(published.arch))
    state, file = published.rename(theirs.state_dict()), tmp_path / "w.pth"
    torch.save(state, file)
    report = load_init_weights(model, map_weights(file), "w")
    assert float((model.encoder(images()) - theirs.forward_features(images())).abs().max()) < 1e-5
    listed = [*report.loaded, *report.resampled, *report.skipped]
    assert sorted(listed) == sorted(state) and not report.resampled
    left = {one for part in published.unused for one in state if part in one}
    assert set(report.skipped) == left
    if name == "DINOv3":
        zero = "qkv.bias is zero, and the model has none"
        assert report.skipped["blocks.0.attn.qkv.bias"] == zero
        assert f"blocks.*: {zero}" in str(report) and "blocks.*: qkv.bias_mask" in str(report)


def test_positions_of_another_grid_are_counted_as_resampled() -> None:
    for name in ("DINOv2", "DINOv2, registers", "CLIP", "PE"):
        published = PUBLISHED[name]
        model = CollaborativeMAE(make_config(published.arch))
        theirs = build_theirs(published.arch, SIDE + 1)
        state = published.rename(theirs.state_dict())
        report = load_init_weights(model, state, "w")
        assert set(report.resampled.values()) == {"5 x 5 to 4 x 4 patches"}
        assert sorted([*report.loaded, *report.resampled, *report.skipped]) == sorted(state)
        theirs.set_input_size(img_size=8 * SIDE)  # resamples
        table = model.encoder.state_dict()["pos_embed"]
        torch.testing.assert_close(table, theirs.pos_embed.detach(), rtol=0, atol=1e-5)


def refusal(arch: str, state: State) -> str:
    model = CollaborativeMAE(make_config(arch))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        load_init_weights(model, state, "w")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return str(caught.value)


def test_what_a_model_of_timm_cannot_take_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arch = "vit_base_patch16_dinov3"
    biased = as_dinov3(build_theirs(f"{arch}_qkvb").state_dict(), WIDTH, DEPTH)
    assert "blocks.0.attn.qkv.bias is not zero" in (text := refusal(arch, biased))
    assert "choose the architecture of timm with dinov3_qkvb in its name" in text
    unmasked = {name: value for name, value in biased.items() if "bias_mask" not in name}
    assert "has a bias of keys" in refusal(f"{arch}_qkvb", unmasked)
    state = as_dinov3(build_theirs(arch).state_dict(), WIDTH, DEPTH)
    assert "set student.arch" in refusal("vit_base_patch16_224", state)
    patches = state | {"patch_embed.proj.weight": torch.zeros(WIDTH, 3, 16, 16)}
    assert "set student.patch_size=16" in refusal(arch, patches)
    short = {name: value for name, value in state.items() if name != "blocks.1.norm1.bias"}
    assert "no tensor for encoder.blocks.1.norm1.bias" in refusal(arch, short)
    registers = {"register_tokens": torch.zeros(1, 4, WIDTH), "mask_token": torch.zeros(1, WIDTH)}
    text = refusal("vit_base_patch14_reg4_dinov2", registers)
    assert "timm cannot convert its names (KeyError: 'cls_token')" in text
    assert not capsys.readouterr().out


def teacher_config(model: str, path: Path) -> Config:
    return timm_config(model, 64, 16, weights=str(path))


def test_a_teachers_weights_are_the_published_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file = tmp_path / "w.pth"
    cases = (("small_dinov3", 64, 8), ("small_dinov2", 56, 1), ("small_pe", 64, 0))
    renames = (lambda s: as_dinov3(s, 32, 2), lambda s: as_dinov2(s, 32), as_clip)
    for (model, size, unused), rename in zip(cases, renames, strict=True):
        torch.manual_seed(2)
        theirs: Any = timm.create_model(model, num_classes=0, img_size=size)
        for parameter in theirs.parameters():
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
        torch.save(rename(theirs.state_dict()), file)
        teacher = build(teacher_config(model, file))
        view = teacher(found := random_images(2, size))
        with torch.no_grad():
            tokens = theirs.eval().forward_features(normalised(found, teacher))
        expected = torch.cat([tokens[:, :1], tokens[:, theirs.num_prefix_tokens :]], 1)
        torch.testing.assert_close(view.features, expected, atol=1e-5, rtol=1e-5)
        assert (f"w.pth: {unused} tensors are not used" in caplog.text) == bool(unused)
        caplog.clear()
    biased = as_dinov3(timm.create_model("small_dinov3", qkv_bias=True).state_dict(), 32, 2)
    biased["blocks.1.attn.qkv.bias"][0] = 1.0
    torch.save(biased, tmp_path / "w.pt")
    with pytest.raises(TeacherError, match=r"teacher.model=small_dinov3: blocks.1.* not zero"):
        build(teacher_config("small_dinov3", tmp_path / "w.pt"))
