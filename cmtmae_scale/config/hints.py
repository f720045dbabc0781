"""Hints for keys and values that users type although the schema lacks them."""

import re
from collections.abc import Collection

RENAMED = {
    "run.dir": "run.output_dir",
    "run.max_seconds": "run.time_limit_s",
    "data.max_bad_share": "data.max_bad_fraction",
    "data.threads": "data.workers",
    "views.size": "views.image_size",
    "views.scale": "views.crop_scale",
    "views.ratio": "views.aspect_ratio",
    "views.flip": "views.hflip",
    "views.count": "views.views_per_image",
    "student.weights": "student.init_weights",
    "mask.salient_frac": "mask.salient_fraction",
    "mask.hint_frac": "mask.hint_fraction",
    "augment.scale": "augment.crop_scale",
    "augment.ratio": "augment.aspect_ratio",
    "augment.flip": "augment.hflip",
    "optimizer.clip": "optimizer.grad_clip",
    "optimizer.warmup": "optimizer.warmup_fraction",
    "train.global_batch": "train.global_batch_size",
    "train.micro_batch": "train.micro_batch_size",
    "backend.shard": "backend.sharding",
}
"""Keys of version 0.1 -> present keys."""

RENAMED_VALUES = {
    ("loss.tokens", "hidden"): "masked",
    ("backend.name", "zero"): "deepspeed",
    ("backend.sharding", "none"): "replicate",
    ("backend.sharding", "node"): "hybrid",
    ("teacher.mode", "live"): "online",
    ("teacher.mode", "cache"): "cached",
    ("teacher.mode", "follow"): "sidecar",
    ("cache.on_miss", "live"): "online",
}
"""Values of version 0.1 -> present values."""

HABITS = {
    "lr": "optimizer.base_lr",
    "base_lr": "optimizer.base_lr",
    "blr": "optimizer.base_lr",
    "optimizer.lr": "optimizer.base_lr",
    "optimizer.blr": "optimizer.base_lr",
    "weight_decay": "optimizer.weight_decay",
    "batch_size": "train.global_batch_size",
    "train.batch_size": "train.global_batch_size",
    "data.batch_size": "train.global_batch_size",
    "epochs": "train.epochs",
    "steps": "train.steps",
    "model": "student.arch",
    "arch": "student.arch",
    "student.model": "student.arch",
    "student.embed_dim": "student.width",
    "student.num_heads": "student.heads",
    "mask_ratio": "mask.ratio",
    "output_dir": "run.output_dir",
    "seed": "run.seed",
    "num_workers": "data.workers",
    "data.num_workers": "data.workers",
    "img_size": "views.image_size",
    "views.img_size": "views.image_size",
    "data_path": "data.path",
    "resume": "run.output_dir",
    "report_to": "log.trackers",
    "use_wandb": "log.trackers",
}
"""Keys of other programs -> keys of this program."""

VALUE_REMEDIES = {
    ("backend.zero_stage", "0"): (
        "it shards nothing: set backend.name=fsdp backend.sharding=replicate"
    )
}
"""Values of other programs -> what to set instead."""


def key_hint(key: str, keys: Collection[str] | None = None) -> str | None:
    """Return the present name of a renamed key, of a key of another program, or of a bare key.

    Args:
        key: full name, ``group.key``, or a bare name.
        keys: keys that a hint may name; ``None``: all keys, and a bare name is not searched for.
    """
    for table, hint in ((RENAMED, "it is now {}"), (HABITS, "did you mean {}?")):
        if key in table and (keys is None or table[key] in keys):
            return hint.format(table[key])
    whole = [one for one in keys or () if one.rpartition(".")[2] == key]
    return f"did you mean {' or '.join(whole)}?" if whole and "." not in key else None


def value_hint(key: str, value: str) -> str | None:
    """Return what to set instead of a value that a closed set no longer has, or never had."""
    key = re.sub(r"^teachers\.\w+\.", "teacher.", key)
    if (key, value) in RENAMED_VALUES:
        return f"{value!r} was renamed to {RENAMED_VALUES[key, value]!r}"
    return VALUE_REMEDIES.get((key, value))
