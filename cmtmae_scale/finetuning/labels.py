"""Compares the labels that a fine-tuning learns with those of its checkpoint.

The digest of an index does not cover labels: tars and Parquet files may be written again with other
labels of the same images.
"""

import logging
from collections.abc import Sequence
from typing import Any

from cmtmae_scale.config.finetune import Finetune
from cmtmae_scale.errors import ConfigError
from dataloading.index import Index

logger = logging.getLogger(__name__)

MOST_NAMED = 4
"""Maximum number of classes that a message names."""


def label_state(index: Index) -> dict[str, Any]:
    """Return what a checkpoint holds about the labels of the training images."""
    return {"classes": list(index.labels), "labels_digest": index.labels_digest()}


def refuse_other_labels(saved: dict[str, Any], present: dict[str, Any], config: Finetune) -> None:
    """Refuse to resume a run whose classifier learned other labels.

    Args:
        saved: state of the checkpoint; one of an earlier version has no labels and is accepted.
        present: from ``label_state``.
        config: checked settings.

    Raises:
        ConfigError: names what differs.
    """
    if "labels_digest" not in saved:
        logger.info(
            "the checkpoint is of an earlier version and holds no labels: those of data.path=%s "
            "are taken as unchanged",
            config.data.path,
        )
    elif saved["labels_digest"] != present["labels_digest"]:
        raise ConfigError(
            f"data.path={config.data.path}: the labels differ from the checkpoint's "
            f"({describe_difference(saved, present)}); restore them, or use another run.output_dir"
        )


def describe_difference(saved: dict[str, Any], present: dict[str, Any]) -> str:
    """Return what differs between two states whose digests differ."""
    before, now = saved["classes"], present["classes"]
    gone, new = (
        [name for name in some if name not in set(others)]
        for some, others in ((before, now), (now, before))
    )
    if gone or new:
        parts = [f"{what}: {name_some(names)}" for what, names in (("gone", gone), ("new", new))]
        return f"classes {'; '.join(parts)}"
    for number, (old, other) in enumerate(zip(before, now, strict=False)):
        if old != other:
            return f"classes in another order: class {number} was {old} and is {other}"
    one, two = (state["labels_digest"][:12] for state in (saved, present))
    return f"images have other classes: digest {one} against {two}"


def name_some(names: Sequence[str]) -> str:
    """Return names as text, such as ``cat, dog and 7 more``."""
    rest = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "") or "none"
