"""The DeepSpeed config of a run: the trainer's own keys, and whatever else the user gives."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from cmtmae_scale.config.trained import Trained
from cmtmae_scale.errors import ConfigError

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
"""Keys that follow from the recipe -> what to set instead."""

REFUSED = {
    "zero_optimization.round_robin_gradients": "it moves weights away from where they are saved",
    "zero_optimization.offload_param": "weights must stay where they can be read and saved",
    "zero_optimization.mics_shard_size": "shards are those of all ranks",
    "zero_optimization.zero_hpz_partition_size": "its second copies are not renewed after loading",
    "zero_optimization.elastic_checkpoint": "checkpoints are this project's own",
    "zero_optimization.load_from_fp32_weights": "checkpoints are this project's own",
    "tensor_parallel": "ranks share the data, not the layers",
    "sequence_parallel_size": "ranks share the data, not the tokens",
    "pipeline": "ranks share the data, not the layers",
    "elasticity": "a run may be resumed on any number of ranks as it is",
    "curriculum_learning": "the data follow from the seed and the position",
    "data_efficiency": "the data follow from the seed and the position",
    "compression_training": "it changes the student",
    "quantize_training": "it changes the student",
    "progressive_layer_drop": "it changes the student",
    "sparse_gradients": "all gradients are dense",
}
"""Keys that would break a promise of this project -> why."""


def deepspeed_config(config: Trained, accumulation: int) -> dict[str, Any]:
    """Merge ``backend.deepspeed`` with what the recipe decides.

    Args:
        config: checked settings.
        accumulation: micro-steps of an optimizer step.

    Returns:
        A tree fit for ``deepspeed.initialize``. Compute as ``backend.precision`` says; float32
        weights, accumulation and reduction.

    Raises:
        ConfigError: for a key that the recipe decides, or a file that cannot be read.
    """
    low = config.backend.precision == "bf16"
    own: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.grad_clip or 0.0,
        "bf16": {"enabled": low},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": config.backend.zero_stage},
    }
    if low:
        own["data_types"] = {"grad_accum_dtype": "fp32"}
    defaults: dict[str, Any] = {
        "steps_per_print": 2**31,  # the trainer speaks for itself
        "zero_force_ds_cpu_optimizer": False,  # offloading keeps torch's AdamW too
    }
    return overlay(overlay(defaults, extra_keys(config.backend.deepspeed)), own)


def extra_keys(given: Any) -> dict[str, Any]:
    """Read ``backend.deepspeed``, a mapping or the path of a JSON file, and check it.

    Raises:
        ConfigError: names the key and what to set instead, or the file and what is wrong with it.
    """
    tree = read_tree(given)
    for key in dotted(tree):
        for parent in parents(key):
            if parent in OWNED:
                raise ConfigError(
                    f"backend.deepspeed: {parent} follows from the recipe; set {OWNED[parent]}"
                )
            if parent in REFUSED:
                raise ConfigError(f"backend.deepspeed: {parent} is refused: {REFUSED[parent]}")
    offload = cast(dict[str, Any], tree.get("zero_optimization", {})).get("offload_optimizer")
    if offload and cast(dict[str, Any], offload).get("device", "none") not in ("none", "cpu"):
        raise ConfigError(
            "backend.deepspeed: zero_optimization.offload_optimizer.device must be cpu: what lies "
            "on disks cannot be averaged and saved"
        )
    return tree


def read_tree(given: Any) -> dict[str, Any]:
    """A mapping as it is, a path's JSON, or nothing."""
    if given is None:
        return {}
    tree: Any = given
    if isinstance(given, str):
        try:
            tree = json.loads(Path(given).read_text())
        except OSError as error:
            raise ConfigError(
                f"backend.deepspeed={given}: cannot be read ({error.strerror})"
            ) from error
        except ValueError as error:
            raise ConfigError(f"backend.deepspeed={given}: is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"backend.deepspeed={given}: expected keys of a DeepSpeed config, or the path of a "
            "JSON file with them"
        )
    tree = cast(dict[str, Any], tree)
    zero = tree.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"backend.deepspeed: zero_optimization={zero} is a group; give its keys")
    return tree


def dotted(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Every key of a tree, as ``a.b``."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from dotted(cast(dict[str, Any], value), f"{prefix}{key}.")


def parents(key: str) -> Iterator[str]:
    """The key itself and every group that it lies in."""
    parts = key.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Lay one tree over another; groups are merged."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            merged[key] = overlay(cast(dict[str, Any], old), cast(dict[str, Any], value))
        else:
            merged[key] = value
    return merged
