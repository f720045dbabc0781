"""Distributed CMT-MAE pre-training: collaborative masking and collaborative targets.

The names of ``API`` are imported at their first use; ``import cmtmae_scale`` costs no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

API = {
    "pretrain": "cmtmae_scale.api.pretrain",
    "load_encoder": "cmtmae_scale.api.encoders",
    "extract_features": "cmtmae_scale.api.features",
    "attention_maps": "cmtmae_scale.api.attention",
    "choose_masks": "cmtmae_scale.api.masks",
    "load_config": "cmtmae_scale.config.load",
    "load_finetune": "cmtmae_scale.config.finetune",
    "CollaborativeMAE": "cmtmae_scale.method.model",
    "select_patches": "cmtmae_scale.method.masking",
    "collaborative_attention": "cmtmae_scale.method.attention",
    "load_full": "cmtmae_scale.export.full",
}
"""Public name -> module that defines it."""


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(API[name]), name)


def __dir__() -> list[str]:
    """List the public names too."""
    return sorted([*globals(), *API])
