"""Configs and small weight files for the teachers' tests."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cmtmae_scale.config.needs import Needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import TeacherError
from cmtmae_scale.teachers.build import build_teacher
from cmtmae_scale.teachers.online import OnlineTeacher

BOTH = Needs(True, True, False, False, False)
TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
}


def make_config(size: int = 32, patch: int = 8, **teacher: Any) -> Config:
    """A student of ``patch`` on views of ``size``, and a teacher."""
    config = Config()
    config.collaboration.alpha_attention = config.collaboration.alpha_target = 0.5
    config.views.image_size = size
    config.student.patch_size = patch
    defaults = {"library": "open_clip", "weights": "random", "quick_gelu": False}
    for name, value in (defaults | teacher).items():
        setattr(config.teacher, name, value)
    return config


def timm_config(model: str, size: int = 32, patch: int = 8, **teacher: Any) -> Config:
    """The same with a timm model and features that every one of them has."""
    settings = {"library": "timm", "quick_gelu": None, "feature": "ln_post", "model": model}
    return make_config(size, patch, **(settings | teacher))


def build(config: Config, needs: Needs = BOTH, dtype: torch.dtype = torch.float32) -> OnlineTeacher:
    """The teacher of a config, which computes on the CPU."""
    teacher = build_teacher(config, "cpu", dtype, needs)
    assert isinstance(teacher, OnlineTeacher)
    return teacher


def refusal(config: Config) -> str:
    """The error of a teacher that cannot be built."""
    with pytest.raises(TeacherError) as caught:
        build(config)
    return str(caught.value)


def prob(rows: Tensor) -> Tensor:
    """Rows with sum 1."""
    return rows / rows.sum(-1, keepdim=True)


def random_images(batch: int, size: int) -> Tensor:
    """Random uint8 images ``[B, S, S, 3]``."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)


def write_json(path: Path, content: object) -> str:
    """Write a model description, return its path as the config has it."""
    path.write_text(json.dumps(content))
    return str(path)


def real_teacher() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The dequantised ViT-S/14 and its open_clip description; skips where it is absent."""
    default = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("CMTMAE_TEST_DATA", default)) / "teacher-vits14-d10"
    if not folder.is_dir():
        pytest.skip(f"no real teacher: {folder} is absent (set CMTMAE_TEST_DATA)")
    stored = load_file(folder / "vits14_d10_int8.safetensors")
    state = {
        name: value.float() * stored[name + ".scale"].float().reshape(-1, *[1] * (value.ndim - 1))
        if name + ".scale" in stored
        else value.float()
        for name, value in stored.items()
        if not name.endswith(".scale")
    }
    return state, json.loads((folder / "open_clip_config.json").read_text())


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names of a ViT with patch bias to those of open_clip's image tower."""
    renames = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.qkv.weight": "attn.in_proj_weight",
        "attn.qkv.bias": "attn.in_proj_bias",
        "attn.proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "ls1": "ls_1",
        "ls2": "ls_2",
    }
    positions = state["pos_embed"][0].clone()
    positions[1:] += state["patch_embed.proj.bias"]
    renamed = {
        "class_embedding": state["cls_token"].flatten(),
        "positional_embedding": positions,
        "conv1.weight": state["patch_embed.proj.weight"],
        "ln_post.weight": state["norm.weight"],
        "ln_post.bias": state["norm.bias"],
        "proj": torch.eye(state["norm.weight"].numel()),
    }
    for name, value in state.items():
        if name.startswith("blocks."):
            for old, new in renames.items():
                name = name.replace(f".{old}", f".{new}")
            renamed["transformer.res" + name] = value
    return renamed
