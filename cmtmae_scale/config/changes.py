"""Settings that may change between the launches of a run, and those that may not."""

import difflib
from fnmatch import fnmatchcase
from typing import Any, cast

from cmtmae_scale.errors import ConfigError

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
"""Keys, or groups with a trailing dot, that may change when a run of any task resumes."""
PRETRAINING_FREE_KEYS = (
    "cache.",
    "teacher.mode",
    "teachers.*.mode",
    "teachers.*.cache_dir",
    "train.micro_batch_size",
    "data.resident",
    "data.index",
    "data.store_cache",
    "data.verify_index",
    "data.source",
    "data.expected_images",
    "data.window_on_sorted",
)
"""Further keys that may change when a pre-training resumes."""
FINETUNING_FREE_KEYS = ("data.test_path", "data.verify_index")
"""Further keys that may change when a fine-tuning resumes; not ``train.micro_batch_size``, because
mixup pairs the views of a micro-batch."""
_ORIENTATION = "data.exif_orientation"  # absent from older checkpoints, which turned no image
FIXED_KEYS = ("run.seed", "views.", _ORIENTATION)
"""Keys that never change within a run, whatever ``run.allow_change`` holds."""
LATER_KEYS: dict[str, Any] = {
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
"""Keys that change the run's tensors, so that the weights of its checkpoint do not fit; no
permission changes that."""


def format_names(names: list[str]) -> str:
    """Return the value of ``run.allow_change`` in the notation of a command line."""
    return f"[{','.join(names)}]"


def is_listed(key: str, names: tuple[str, ...]) -> bool:
    """Return whether a key or its group is among names; ``*`` matches the name of any entry."""
    return any(
        key.startswith(name) if name.endswith(".") else fnmatchcase(key, name) for name in names
    )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested groups and named entries into ``a.b`` keys; schedules stay whole."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and value:
            entries = cast(list[Any], value)
            if all(isinstance(one, dict) for one in entries):
                value = {str(one.get("name")): one for one in entries}
        if isinstance(value, dict) and "kind" not in value:
            flat.update(flatten(cast(dict[str, Any], value), f"{prefix}{key}."))
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
        free: keys, or groups with a trailing dot, that may differ.

    Returns:
        Allowed changes outside of the free keys, as text; they restart the count of positions.

    Raises:
        ConfigError: names key, old and new value of a change that is not allowed.
    """
    new = flatten(present)
    old = {key: was for key, was in LATER_KEYS.items() if key in new} | flatten(saved)
    hint = start = ""
    if "student" in saved:
        run_dir = new.get("run.output_dir")
        start = f", there with student.init_from_run={run_dir} to continue from these weights"
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
        changes.append(f"{text}; from here on {after} applies")
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
