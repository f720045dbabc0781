"""Whether a checkpoint may be continued under the present config."""

import difflib
from typing import Any

from cmtmae_scale.errors import ConfigError

# Keys, or groups with their point.
FREE = (
    "run.name",
    "run.output_dir",
    "run.allow_change",
    "run.time_limit_s",
    "log.",
    "eval.",
    "cache.",
    "checkpoint.",
    "backend.",
    "guard.",
    "teacher.mode",
    "train.micro_batch_size",
    "train.stop_after",
    "data.decode",
    "data.resident",
    "data.workers",
    "data.path",
    "data.index",
    "data.source",
    "data.expected_images",
    "data.max_bad_fraction",
    "data.window_on_sorted",
)
NEVER = ("run.seed", "views.")


def listed(key: str, names: tuple[str, ...]) -> bool:
    """Whether a key or its group is among names."""
    return any(key.startswith(name) if name.endswith(".") else key == name for name in names)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested groups into ``a.b`` keys; schedules stay whole."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and "kind" not in value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def compare(
    saved: dict[str, Any],
    present: dict[str, Any],
    allowed: list[str],
    digests: tuple[str, str],
    free: tuple[str, ...] = FREE,
) -> list[str]:
    """Compare the config of a checkpoint with the present one.

    Args:
        saved: the checkpoint's config as a tree.
        present: the present config as a tree.
        allowed: ``run.allow_change``.
        digests: index digest of the checkpoint and of the present data.
        free: keys, or groups with their point, that may differ.

    Returns:
        Allowed changes outside the free keys, as text that says which value counts; they restart
        the position count.

    Raises:
        ConfigError: names key, old and new value of a change that is not allowed.
    """
    if digests[0] != digests[1]:
        raise ConfigError(
            f"data.path: the images differ from the checkpoint's (digest {digests[0][:12]} against "
            f"{digests[1][:12]}); restore them or start another run.output_dir"
        )
    old, new = flatten(saved), flatten(present)
    check_allowed(allowed, new)
    changes: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after or listed(key, free):
            continue
        text = f"{key}: the checkpoint has {before}, the config {after}"
        if listed(key, NEVER):
            raise ConfigError(f"{text}; it never changes within a run: use another run.output_dir")
        if key not in allowed:
            raise ConfigError(
                f"{text}; restore it, use another run.output_dir, or add it to run.allow_change"
            )
        changes.append(f"{text}; from here on {after} counts")
    return changes


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
