"""Whether a run may resume a checkpoint under the present config, and from where."""

import difflib
import logging
from fnmatch import fnmatchcase
from typing import Any

from cmtmae_scale.config.derive import BatchPlan, pairs_views, split_batch, total_steps
from cmtmae_scale.config.load import config_to_dict
from cmtmae_scale.config.schema import Trained
from cmtmae_scale.engine.progress import Progress, fresh_progress, resumed_progress
from cmtmae_scale.engine.task import Task
from cmtmae_scale.errors import CheckpointError, ConfigError
from dataloading.index import Index

logger = logging.getLogger(__name__)

FREE_KEYS = (
    "run.name",
    "run.output_dir",
    "run.allow_change",
    "run.time_limit_s",
    "run.deterministic",
    "log.",
    "eval.",
    "checkpoint.",
    "backend.",
    "guard.",
    "train.stop_after",
    "data.path",
    "data.decode",
    "data.workers",
    "data.worker_type",
    "data.max_bad_fraction",
)
"""Keys, or groups with their point, that may change at a resume of every task."""
_ORIENTATION = "data.exif_orientation"  # absent from older checkpoints, which turned no image
FIXED_KEYS = ("run.seed", "views.", _ORIENTATION)
"""Keys that never change within a run, whatever ``run.allow_change`` holds."""
LATER_KEYS = {
    "teacher.precision": "bf16",
    "momentum.precision": "bf16",
    "student.init_optimizer": False,
    "teachers": [],
}
"""Keys that older checkpoints lack, with the values that their runs had."""
RESHAPING_KEYS = (
    "student.arch",
    "student.patch_size",
    "student.width",
    "student.depth",
    "decoder.depth",
    "decoder.width",
    "head.pool",
)
"""Keys with which the run has other tensors than its checkpoint: no permission makes them fit."""


def format_names(names: list[str]) -> str:
    """Return ``run.allow_change``'s value as a command line takes it."""
    return f"[{','.join(names)}]"


def is_listed(key: str, names: tuple[str, ...]) -> bool:
    """Return whether a key or its group is among names; ``*`` is any name of an entry."""
    return any(
        key.startswith(name) if name.endswith(".") else fnmatchcase(key, name) for name in names
    )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested groups and named entries into ``a.b`` keys; schedules stay whole."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            value = {str(one.get("name")): one for one in value}
        if isinstance(value, dict) and "kind" not in value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def compare_configs(
    saved: dict[str, Any],
    present: dict[str, Any],
    allowed: list[str],
    digests: tuple[str, str],
    free: tuple[str, ...],
) -> list[str]:
    """Compare the config of a checkpoint with the present config.

    Args:
        saved: the checkpoint's config as a tree.
        present: the present config as a tree.
        allowed: ``run.allow_change``.
        digests: index digest of the checkpoint and of the present data.
        free: keys, or groups with their point, that may differ.

    Returns:
        Allowed changes outside the free keys, as text; they restart the count of positions.

    Raises:
        ConfigError: names key, old and new value of a change that is not allowed.
    """
    new = flatten(present)
    old = {key: was for key, was in LATER_KEYS.items() if key in new} | flatten(saved)
    hint = start = ""
    if "student" in saved:
        run_dir = old.get("run.output_dir")
        start = f", there with student.init_from_run={run_dir} to go on from these weights"
    if _ORIENTATION not in old:  # the digests decide whether the key matters
        old[_ORIENTATION] = new.get(_ORIENTATION)
        hint = (
            f", set {_ORIENTATION}=false if they were not turned," if new.get(_ORIENTATION) else ""
        )
    if digests[0] != digests[1] and old[_ORIENTATION] == new.get(_ORIENTATION):
        raise ConfigError(
            f"data.path: the images differ from the checkpoint's (digest {digests[0][:12]} against "
            f"{digests[1][:12]}); restore them{hint} or use another run.output_dir{start}"
        )
    check_allowed(allowed, new)
    names, before = list_teachers(new), list_teachers(old)
    if names != before:
        raise ConfigError(
            f"teachers: the checkpoint has {', '.join(before) or 'none'}, the config "
            f"{', '.join(names) or 'none'}; each has weights of its own: restore the list, or use "
            "another run.output_dir"
        )
    changes: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after or is_listed(key, free):
            continue
        text = f"{key}: the checkpoint has {before}, the config {after}"
        if is_listed(key, FIXED_KEYS):
            raise ConfigError(
                f"{text}; it never changes within a run: use another run.output_dir{start}"
            )
        if key in RESHAPING_KEYS and key not in allowed:
            raise ConfigError(
                f"{text}; the weights of the checkpoint do not fit: restore it, or use another "
                "run.output_dir"
            )
        if key not in allowed:
            raise ConfigError(
                f"{text}; restore it, use another run.output_dir, or add it to run.allow_change: "
                f"run.allow_change={format_names([*allowed, key])}"
            )
        changes.append(f"{text}; from here on {after} counts")
    return changes


def list_teachers(flat: dict[str, Any]) -> list[str]:
    """Return the names of the entries of ``teachers`` among full keys, sorted."""
    return sorted({key.split(".")[1] for key in flat if key.startswith("teachers.")})


def check_allowed(allowed: list[str], present: dict[str, Any]) -> None:
    """Refuse a name in ``run.allow_change`` that would have no effect.

    Raises:
        ConfigError: names it and the nearest key.
    """
    for name in allowed:
        if name not in present:
            near = difflib.get_close_matches(name, present, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else "; it takes full names: group.key"
            raise ConfigError(f"run.allow_change: {name} is not a key{hint}")


def find_progress(
    config: Trained, task: Task, index: Index, saved: dict[str, Any] | None
) -> Progress:
    """Return the progress of a new run, or of the checkpoint that is resumed.

    Args:
        config: checked settings.
        task: what is trained.
        index: the training images.
        saved: state of the checkpoint; ``None``: a new run.

    Raises:
        ConfigError: if the checkpoint is of another task, or a setting must not change.
    """
    steps = total_steps(config, len(index))
    if saved is None:
        return fresh_progress(steps, config.train.global_batch_size)
    changes = compare_run(config, task.name, task.free_keys, saved, index.digest)
    for change in changes:
        logger.warning("allowed change: %s", change)
    return resumed_progress(saved["progress"], steps, config.train.global_batch_size, bool(changes))


def compare_run(
    config: Trained, task: str, free_keys: tuple[str, ...], saved: dict[str, Any], digest: str
) -> list[str]:
    """Compare task, images and settings of a checkpoint with those of this launch.

    Args:
        config: checked settings.
        task: name of the task.
        free_keys: keys of the task, or groups with their point, that may differ.
        saved: state of the checkpoint.
        digest: of the images' index; that of the checkpoint where the images are not compared.

    Returns:
        Allowed changes outside the free keys, as text.

    Raises:
        ConfigError: if the checkpoint is of another task, or a setting must not change.
    """
    if saved["task"] != task:
        raise ConfigError(
            f"run.output_dir={config.run.output_dir} holds checkpoints of {saved['task']}, and "
            f"this command does {task}; use another run.output_dir"
        )
    changes = compare_configs(
        saved["config"],
        config_to_dict(config),
        config.run.allow_change,
        (saved["index_digest"], digest),
        FREE_KEYS + free_keys,
    )
    for change in changes:
        if change.partition(":")[0] in RESHAPING_KEYS:
            raise ConfigError(
                f"{change.partition('; from here')[0]}; run.allow_change cannot make the weights "
                "of the checkpoint fit: restore it, or use another run.output_dir"
            )
    return changes


def refuse_other_pairs(config: Trained, plan: BatchPlan, saved: dict[str, Any] | None) -> None:
    """Refuse a split of the batch that pairs other views than the run's, where views are paired.

    Args:
        config: checked settings, already compared with those of the checkpoint.
        plan: split of the batch on the present ranks.
        saved: state of the checkpoint; ``None``: a new run.

    Raises:
        ConfigError: names both micro-batches and a number of ranks that keeps the pairs.
    """
    if saved is None or not pairs_views(config):
        return
    old = flatten(saved["config"])
    total, limit = config.train.global_batch_size, config.train.micro_batch_size
    if (old.get("train.global_batch_size"), old.get("train.micro_batch_size")) != (total, limit):
        return  # an allowed change, which compare_configs has reported
    ranks = saved["world_size"]
    before = split_batch(total, limit, ranks, unit=2).micro_batch_size
    if before != plan.micro_batch_size:
        other = split_batch(total, before, plan.world_size, unit=2).micro_batch_size
        names = format_names([*config.run.allow_change, "train.micro_batch_size"])
        effect = "" if other == before else ", which pairs other views"
        remedy = f", or set train.micro_batch_size={other} and run.allow_change={names}{effect}"
        raise ConfigError(
            f"train.micro_batch_size={limit}: {ranks} ranks had micro-batches of {before} views, "
            f"{plan.world_size} ranks have {plan.micro_batch_size}, and mixup and cutmix pair the "
            f"views of a micro-batch; resume on {ranks} ranks" + (remedy if other != limit else "")
        )


def explain_misfit(error: CheckpointError, allowed: list[str]) -> CheckpointError:
    """Return the error of weights that do not fit, with the permissions that led to it."""
    if not allowed:
        return error
    return CheckpointError(
        f"{error}; run.allow_change={format_names(allowed)} cannot make other tensors fit: restore "
        "the settings of the checkpoint, or use another run.output_dir"
    )
