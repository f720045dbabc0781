"""Families of students: each is trained three steps, exported for timm, and starts from a file."""

import json
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmtmae_scale.backends.initial import initialise_backend
from cmtmae_scale.backends.plain import Plain
from cmtmae_scale.checkpoint.chunks import HostChunk, write_chunks
from cmtmae_scale.checkpoint.index import INDEX, rank_file
from cmtmae_scale.checkpoint.init_weights import load_init_weights
from cmtmae_scale.checkpoint.layout import STATE
from cmtmae_scale.checkpoint.shards import build_index, describe_shard, write_encoder
from cmtmae_scale.config.load import config_to_dict
from cmtmae_scale.config.schema import Config
from cmtmae_scale.evaluation.subject import subject_from_file
from cmtmae_scale.export.encoder import build_timm
from cmtmae_scale.method.build import probe_student
from cmtmae_scale.method.initialisation import initial_values, initialise
from cmtmae_scale.method.masking import choose_masks, token_counts
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.method.student import Student
from cmtmae_scale.method.targets import TokenLayout, normalise
from cmtmae_scale.pretraining.build import build_model, make_objective
from cmtmae_scale.pretraining.prepare import MicroBatch
from cmtmae_scale.pretraining.task import Pretraining
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.teachers.weights import read_weights

STEPS, VIEWS, SIDE = 3, 4, 4
CPU = torch.device("cpu")


class Family(NamedTuple):
    """A tiny student of an architecture of timm."""

    arch: str
    trained: tuple[str, ...]
    """Parts of names of parameters that this family alone has."""
    num_classes: int = 0
    """Outputs of the published model's head."""


FAMILIES = {
    "MAE": Family("vit_base_patch16_224", ("cls_token",)),
    "CLIP": Family("vit_base_patch16_clip_224", ("norm_pre.weight",), num_classes=8),
    "DINOv2": Family("vit_large_patch14_reg4_dinov2", ("reg_token", "ls1.gamma")),
    "DINOv2, SwiGLU": Family("vit_giant_patch14_reg4_dinov2", ("ls2.gamma", "mlp.fc1.weight")),
    "rotary": Family("vit_medium_patch16_rope_reg1_gap_256", ("reg_token", "gamma_1")),
    "DINOv3": Family("vit_base_patch16_dinov3", ("reg_token", "gamma_1")),
    "DINOv3, 7B": Family("vit_7b_patch16_dinov3", ("mlp.fc1_g.weight", "gamma_2")),
    "EVA-02": Family("eva02_base_patch14_224", ("q_proj.bias", "mlp.norm.weight")),
    "PE": Family("vit_pe_core_base_patch16_224", ("norm_pre.weight",)),
    "RoPE-ViT": Family("vit_base_patch16_rope_mixed_224", ("rope.freqs", "gamma_1")),
}


def make_config(arch: str) -> Config:
    """Two blocks of two heads of 48 channels, on 4 x 4 patches; no teacher."""
    config = Config()
    config.student.arch = arch
    config.student.width, config.student.depth, config.student.heads = 96, 2, 2
    config.student.patch_size = 8
    config.views.image_size = 8 * SIDE
    config.decoder.depth, config.decoder.width, config.decoder.heads = 1, 32, 2
    config.collaboration.alpha_attention = config.collaboration.alpha_target = 0.0
    config.loss.teacher, config.mask.salient_fraction = 0.0, 0.5
    config.backend.precision = "fp32"
    return config


def images(count: int = VIEWS) -> Tensor:
    return torch.randn(count, 3, 8 * SIDE, 8 * SIDE, generator=torch.manual_seed(4))


def train(config: Config) -> tuple[Plain, dict[str, Tensor]]:
    """Train three steps; returns the backend and the initial weights."""
    model, momentum = build_model(config, {})
    values = initial_values(model, 0)
    counts = token_counts(SIDE * SIDE, config.mask.ratio)
    layout = TokenLayout.from_config(config, *counts)
    compute = make_objective(config, layout)
    backend = Plain(model, momentum, compute, config.optimizer, config.backend, 1 / VIEWS, CPU)
    initialise_backend(backend, values)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(STEPS):
        features, attention = backend.momentum_forward(images())
        assert features is not None and attention is not None
        torch.testing.assert_close(attention.sum(1), torch.ones(VIEWS))
        positions = torch.arange(VIEWS) + step * VIEWS
        choice = choose_masks(config.mask, attention, positions, 0, 0.5, length=SIDE * SIDE)
        targets = {"student": layout.gather(normalise(features, "ln"), choice)}
        valid = torch.ones(VIEWS, dtype=torch.bool)
        batch = MicroBatch(images(), choice, targets, valid, torch.tensor(0.0))
        losses = backend.micro(batch, last=True)
        outcome = backend.step(1e-3, torch.zeros(1))
        assert outcome.applied and bool(torch.isfinite(losses["total"]))
        backend.momentum_update(0.9)
    return backend, before


def publish(family: Family, side: int) -> Any:
    """timm's own model of the tiny sizes as its weights are published, with random values."""
    sizes = {
        "num_classes": family.num_classes,
        "img_size": 8 * side,
        "patch_size": 8,
        "embed_dim": 96,
        "depth": 2,
        "num_heads": 2,
    }
    theirs = timm.create_model(family.arch, **sizes)
    generator = torch.manual_seed(side)
    for parameter in theirs.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return theirs.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_trained_exported_and_initialised(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    config = make_config(family.arch)
    config.loss.include_cls = probe_student(config).cls_token is not None

    backend, before = train(config)
    after = backend.model.state_dict()
    unchanged = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert unchanged == ({"encoder.pos_embed"} & before.keys())
    assert all(any(part in name for name in before) for part in family.trained)

    encoder: dict[str, Tensor] = {n: v for n, v in after.items() if n.startswith("encoder.")}
    chunks = [
        HostChunk(f"model.{name}", 0, tuple(value.shape), value.flatten())
        for name, value in encoder.items()
    ]
    shapes = {chunk.key: chunk.shape for chunk in chunks}
    facts = write_chunks(chunks, tmp_path / rank_file(0))
    index = build_index({0: describe_shard(facts, chunks, shapes)}, shapes)
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / STATE).write_text(json.dumps({"config": config_to_dict(config)}))
    file = tmp_path / "encoder.safetensors"
    write_encoder(tmp_path, file, "student")
    theirs = build_timm(config)[0].eval()
    theirs.load_state_dict(load_file(file))
    subject = subject_from_file(file, None, CPU)
    assert isinstance(subject.encoder.network, Student)
    with torch.no_grad():
        ours = subject.encoder.network(images())
        assert float((ours - theirs.forward_features(images())).abs().max()) < 1e-5

    for side in (SIDE, SIDE + 2):
        published = publish(family, side)
        save_file(published.state_dict(), file)
        model = CollaborativeMAE(config)
        initialise(model, 0)
        report = load_init_weights(model, read_weights(file), "w")
        assert all(name.startswith(("head.", "attn_pool.")) for name in report.skipped)
        resampled = side != SIDE and published.pos_embed is not None
        assert report.resampled.keys() == ({"pos_embed"} if resampled else set())
        if side == SIDE:
            with torch.no_grad():
                expected = published.fc_norm(published.forward_features(images()))
                assert float((model.encoder(images()) - expected).abs().max()) < 1e-5


def test_a_launch_names_published_weights_that_are_not_loaded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = make_config("vit_base_patch16_224.mae")
    config.train.steps = 1
    task = Pretraining(config, World(0, 1, 0, 1, "none"), CPU)
    task.index = cast(Any, range(8))
    task.warn_of_settings()
    assert "student.arch=vit_base_patch16_224.mae: the weights mae" in caplog.text
