"""The DeepSpeed config of a run: keys that follow from the recipe, and the user's own keys."""

import json
from collections.abc import Iterator
from typing import Any, cast

from cmtmae_scale.config.schema import Trained
from cmtmae_scale.errors import ConfigError, remedy_for
from dataloading.files import open_regular

MAX_BYTES = 2**20
"""Largest DeepSpeed config that is read."""
OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "managed_gradient_accumulation": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "the group optimizer",
    "scheduler": "the group optimizer",
    "fp16": "backend.precision",
    "bf16": "backend.precision",
    "bfloat16": "backend.precision",
    "amp": "backend.precision",
    "torch_autocast": "backend.precision",
    "data_types": "backend.precision",
    "communication_data_type": "backend.precision",
    "prescale_gradients": "backend.precision",
    "gradient_predivide_factor": "backend.precision",
    "activation_checkpointing": "backend.activation_checkpointing",
    "compile": "backend.compile",
    "checkpoint": "the group checkpoint",
    "zero_optimization.stage": "backend.zero_stage",
}
"""Keys that follow from the recipe -> the keys to set instead."""

REFUSED = {
    "zero_optimization.round_robin_gradients": "it partitions weights differently from checkpoints",
    "zero_optimization.offload_param": "checkpoints and EMA read the weights on the device",
    "zero_optimization.mics_shard_size": "weights are sharded over all ranks",
    "zero_optimization.zero_hpz_partition_size": "its secondary copies are stale after a resume",
    "zero_optimization.elastic_checkpoint": "checkpoints are this project's own",
    "zero_optimization.load_from_fp32_weights": "checkpoints are this project's own",
    "tensor_parallel": "ranks share the data, not the layers",
    "sequence_parallel_size": "ranks share the data, not the tokens",
    "pipeline": "ranks share the data, not the layers",
    "elasticity": "a run resumes on any number of ranks without it",
    "curriculum_learning": "the seed and the global sample index determine the data",
    "data_efficiency": "the seed and the global sample index determine the data",
    "compression_training": "it changes the student",
    "quantize_training": "it changes the student",
    "progressive_layer_drop": "it changes the student",
    "sparse_gradients": "all gradients are dense",
}
"""Keys that would break a guarantee of this project -> the reason."""


def deepspeed_config(
    config: Trained, accumulation: int, micro_batch_size: int | None = None
) -> dict[str, Any]:
    """Merge ``backend.deepspeed`` with the keys that the recipe determines.

    Args:
        config: checked settings.
        accumulation: micro-steps of an optimizer step.
        micro_batch_size: views per rank and forward; ``None``: ``train.micro_batch_size``.

    Returns:
        The config for ``deepspeed.initialize``: compute dtype as in ``backend.precision``; float32
        weights, accumulation and reduction.

    Raises:
        ConfigError: for a key that the recipe determines, or a file that cannot be read.
    """
    low = config.backend.precision == "bf16"
    own: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size or config.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.grad_clip or 0.0,
        "bf16": {"enabled": low},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": config.backend.zero_stage},
    }
    if low:
        own["data_types"] = {"grad_accum_dtype": "fp32"}
    defaults: dict[str, Any] = {
        "steps_per_print": 2**31,  # the engine logs progress
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, with offloading too
    }
    return overlay(overlay(defaults, extra_keys(config.backend.deepspeed)), own)


def extra_keys(given: Any) -> dict[str, Any]:
    """Read ``backend.deepspeed``, a mapping or the path of a JSON file, and check it.

    Raises:
        ConfigError: names the key and what to set instead, or the file and its problem.
    """
    tree = read_extra_keys(given)
    for key in dotted_keys(tree):
        for parent in parent_keys(key):
            if parent in OWNED:
                raise ConfigError(
                    f"backend.deepspeed: {parent} follows from the recipe; set {OWNED[parent]}"
                )
            if parent in REFUSED:
                raise ConfigError(f"backend.deepspeed: {parent} is refused: {REFUSED[parent]}")
    offload = cast(dict[str, Any], tree.get("zero_optimization", {})).get("offload_optimizer")
    if offload and cast(dict[str, Any], offload).get("device", "none") not in ("none", "cpu"):
        raise ConfigError(
            "backend.deepspeed: zero_optimization.offload_optimizer.device must be cpu: "
            "states on disk cannot be averaged and saved"
        )
    return tree


def read_extra_keys(given: Any) -> dict[str, Any]:
    """Return a mapping as it is, the JSON of a path, or an empty mapping."""
    if given is None:
        return {}
    tree: Any = given
    if isinstance(given, str):
        try:
            with open(open_regular(given), "rb") as opened:
                tree = json.loads(opened.read(MAX_BYTES), object_pairs_hook=require_distinct)
            texts = list(walk_texts(tree))
        except OSError as error:
            raise ConfigError(
                f"backend.deepspeed={given}: cannot be read ({error.strerror}); "
                f"{remedy_for(error, 'correct the path')}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"backend.deepspeed={given}: is not JSON: {error}") from error
        if any("${" in text for text in texts):
            raise ConfigError(
                f"backend.deepspeed={given}: interpolation ${{...}} is not supported; write the "
                "value out"
            )
    if not isinstance(tree, dict):
        raise ConfigError(
            f"backend.deepspeed={given}: expected keys of a DeepSpeed config, or the path of a "
            "JSON file with them"
        )
    tree = cast(dict[str, Any], tree)
    zero = tree.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"backend.deepspeed: zero_optimization={zero} is a group; give its keys")
    offload = cast(dict[str, Any], zero).get("offload_optimizer")
    if offload is not None and not isinstance(offload, dict):
        raise ConfigError(
            f"backend.deepspeed: zero_optimization.offload_optimizer={offload} is a group; give "
            "its keys, such as device: cpu"
        )
    return tree


def require_distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, and refuse a key that is given twice, as DeepSpeed does.

    Raises:
        ValueError: names the key.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} is given twice; keep one")
        found[key] = value
    return found


def walk_texts(tree: Any) -> Iterator[str]:
    """Yield every text of a JSON tree, including keys."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        for key, value in cast(dict[str, Any], tree).items():
            yield key
            yield from walk_texts(value)
    elif isinstance(tree, list):
        for item in cast(list[Any], tree):
            yield from walk_texts(item)


def dotted_keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield every key of a tree, as ``a.b``."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from dotted_keys(cast(dict[str, Any], value), f"{prefix}{key}.")


def parent_keys(key: str) -> Iterator[str]:
    """Yield every group that holds a key, and the key itself."""
    parts = key.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two trees; values of ``above`` take precedence, and groups are merged."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            merged[key] = overlay(cast(dict[str, Any], old), cast(dict[str, Any], value))
        else:
            merged[key] = value
    return merged
