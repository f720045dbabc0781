"""The weights of the teachers that a run learns from: the same files as when it began.

The settings name a file, in whose place another one may be put.
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
    """Return what a checkpoint holds: the SHA-256 of each teacher's file, where it is known.

    It is not known where weights are drawn at random, or where their file is not at hand.

    Args:
        config: checked settings.
        teachers: by name.
        saved: state of the checkpoint that is resumed; ``None``: a new run.

    Raises:
        ConfigError: another file than the run's, naming the teacher and both digests.
    """
    digests = {name: digest_of(source) for name, source in teachers.items()}
    now = {name: digest for name, digest in digests.items() if digest is not None}
    before: dict[str, str] = {} if saved is None else saved.get(TEACHER_WEIGHTS, {})
    for name in now:
        if name not in before or before[name] == now[name]:
            continue
        key = entry_text("teacher.weights", name)
        found = f"{key}: the SHA-256 of the file is {now[name][:12]}, the run's {before[name][:12]}"
        if key not in config.run.allow_change:
            raise ConfigError(
                f"{found}; put that file back, use another run.output_dir, or permit the change "
                f"with run.allow_change=[{key}]"
            )
        logger.warning("allowed change: %s", found)
    return {TEACHER_WEIGHTS: before | now}


def digest_of(source: TeacherSource) -> str | None:
    """Return the SHA-256 of a teacher's file, of a cache that of the file it was built with."""
    if isinstance(source, CachedTeacher):
        return source.manifest.fingerprint["teacher"].get("weights_sha256")
    online = source.online if isinstance(source, SidecarTeacher) else source
    return online.weights_sha256 if isinstance(online, OnlineTeacher) else None
