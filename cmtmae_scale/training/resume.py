"""Whether a checkpoint may be continued under the present config."""

from typing import Any

from cmtmae_scale.errors import ConfigError

FREE = (
    "run.name",
    "run.dir",
    "run.allow_change",
    "log.",
    "checkpoint.",
    "backend.",
    "teacher.mode",
    "train.micro_batch",
    "train.stop_after",
    "data.decode",
    "data.threads",
    "data.path",
    "data.index",
    "data.source",
    "data.expected_images",
    "data.max_bad_share",
    "data.window_on_sorted",
)
NEVER = ("run.seed",)


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
    saved: dict[str, Any], present: dict[str, Any], allowed: list[str], digests: tuple[str, str]
) -> list[str]:
    """Compare the config of a checkpoint with the present one.

    Args:
        saved: the checkpoint's config as a tree.
        present: the present config as a tree.
        allowed: ``run.allow_change``.
        digests: index digest of the checkpoint and of the present data.

    Returns:
        Allowed changes outside the free keys, as text; they restart the position count.

    Raises:
        ConfigError: names key, old and new value of a change that is not allowed.
    """
    if digests[0] != digests[1]:
        raise ConfigError(
            f"data.path: the images differ from the checkpoint's (digest {digests[0][:12]} against "
            f"{digests[1][:12]}); restore them or start another run.dir"
        )
    old, new = flatten(saved), flatten(present)
    changes: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after or key.startswith(FREE):
            continue
        text = f"{key}: the checkpoint has {before}, the config {after}"
        if key in NEVER:
            raise ConfigError(f"{text}; it never changes within a run: use another run.dir")
        if key not in allowed:
            raise ConfigError(
                f"{text}; restore it, use another run.dir, or add it to run.allow_change"
            )
        changes.append(text)
    return changes
