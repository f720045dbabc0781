"""Verifies that a run's teachers have the same weights as when the run began.

The settings name a file, which may have been replaced, or a factory, which may return other weights
at a later launch.
"""

import logging
from collections.abc import Mapping
from typing import Any

from cmtmae_scale.cache.teacher import CachedTeacher, SidecarTeacher
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import entry_text
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.teachers.base import TeacherSource
from cmtmae_scale.teachers.online import OnlineTeacher

logger = logging.getLogger(__name__)

TEACHER_WEIGHTS = "teacher_weights"
"""Key of the state of a checkpoint."""


def compare_weights(
    config: Config, teachers: Mapping[str, TeacherSource], saved: dict[str, Any] | None
) -> dict[str, dict[str, str]]:
    """Return what a checkpoint holds: the SHA-256 of each teacher's weights, if it is known.

    It is unknown if timm or open_clip initialise the weights at random, or if the file is not
    available.

    Args:
        config: checked settings.
        teachers: by name.
        saved: state of the checkpoint that is resumed; ``None``: a new run.

    Raises:
        ConfigError: other weights than the run's; names the teacher and both digests.
    """
    digests = {name: digest_of(source) for name, source in teachers.items()}
    now = {name: digest for name, digest in digests.items() if digest is not None}
    before: dict[str, str] = {} if saved is None else saved.get(TEACHER_WEIGHTS, {})
    for name in now:
        if name not in before or before[name] == now[name]:
            continue
        key = entry_text("teacher.weights", name)
        here, there = now[name][:12], before[name][:12]
        found = f"{key}: the SHA-256 of the weights is {here}, the run's {there}"
        if key not in config.run.allow_change:
            raise ConfigError(
                f"{found}; restore the run's weights, use another run.output_dir, or permit the "
                f"change with run.allow_change=[{key}]"
            )
        logger.warning("allowed change: %s", found)
    return {TEACHER_WEIGHTS: before | now}


def digest_of(source: TeacherSource) -> str | None:
    """Return the SHA-256 of a teacher's file, or of the weights that its factory returned.

    For a cache it is the SHA-256 of the weights that the cache was built with.
    """
    online = source.online if isinstance(source, SidecarTeacher) else source
    facts: dict[str, Any] = {}
    if isinstance(source, CachedTeacher):
        facts = source.manifest.fingerprint["teacher"]
    elif isinstance(online, OnlineTeacher):
        facts = online.fingerprint()
    return facts.get("weights_sha256") or facts.get("state_sha256")
