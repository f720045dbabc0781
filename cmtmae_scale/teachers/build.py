"""Build the teacher of a config, or none for a run that does not use one."""

import logging

import torch

from cmtmae_scale.config.needs import Needs
from cmtmae_scale.config.needs import needs as needs_of
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import entry_errors, entry_message, teacher_configs
from cmtmae_scale.errors import TeacherError
from cmtmae_scale.method.build import probe_student
from cmtmae_scale.method.float8 import use_float8
from cmtmae_scale.teachers.base import Teacher, TeacherOutputs
from cmtmae_scale.teachers.online import OnlineTeacher
from cmtmae_scale.teachers.python import PythonSource
from cmtmae_scale.teachers.timm import TimmSource

logger = logging.getLogger(__name__)


def build_teacher(
    config: Config, device: torch.device | str, dtype: torch.dtype, needs: Needs | None = None
) -> Teacher | None:
    """Build the frozen teacher of a run.

    Args:
        config: the run.
        device: device of the teacher.
        dtype: compute dtype, bfloat16 or float32.
        needs: which of attention map and features are computed; ``None``: ``needs(config)``.

    With ``teacher.mode=cached`` it is the teacher whose outputs the cache holds.

    Returns:
        The teacher, in eval mode and without gradients, or ``None`` if neither its attention map
        nor its features are used, or with ``teacher.mode=none``. Its ``image_size`` is the
        student's grid times its patch size unless the config sets another.

    Raises:
        TeacherError: for an unusable model, weights or size; names key and remedy.
        ConfigError: for a student that does not fit ``views.image_size``.

    Source: docs/method.md, sections "Teacher" and "Grids".
    """
    if config.teacher.mode == "none":
        return None
    needs = needs_of(config) if needs is None else needs
    if not needs.teacher:
        return None
    return assemble_teacher(config, needs, load=True).to(device, dtype)


def build_teacher_skeleton(config: Config, needs: Needs | None = None) -> OnlineTeacher:
    """Build the teacher without reading or downloading weights, for counting on the meta device.

    Raises:
        TeacherError: as ``build_teacher``, except for weights.
    """
    return assemble_teacher(config, needs_of(config) if needs is None else needs, load=False)


def build_skeletons(config: Config) -> dict[str, OnlineTeacher]:
    """Build the teachers that a run uses by name, see ``build_teacher_skeleton``.

    Raises:
        TeacherError: as ``build_teacher_skeleton``; names the teacher.
    """
    found: dict[str, OnlineTeacher] = {}
    for name, alone in teacher_configs(config).items():
        if needs_of(alone).teacher:
            with entry_errors(name):
                found[name] = build_teacher_skeleton(alone)
    return found


def assemble_teacher(config: Config, needs: Needs, *, load: bool) -> OnlineTeacher:
    """Choose library, size and outputs, and build the teacher."""
    settings = config.teacher
    for key in ("model",) if settings.library == "python" else ("model", "weights"):
        if not getattr(settings, key):
            raise TeacherError(f"teacher.{key} must be given: mask or loss use the teacher")
    if settings.library == "python":
        source = PythonSource(settings, config.run.seed)
    elif settings.library == "open_clip":
        # imported here, so that runs with other teachers do not load the library
        from cmtmae_scale.teachers.open_clip import OpenClipSource

        source = OpenClipSource(settings)
    else:
        source = TimmSource(settings)
    rows, columns = probe_student(config).patch_embed.grid_size
    grid = int(rows), int(columns)
    size = settings.image_size or grid[0] * source.patch
    if size % source.patch:
        below = size // source.patch * source.patch
        nearest = f"{below} or {below + source.patch}" if below else f"{source.patch}"
        raise TeacherError(
            f"teacher.image_size={size} is not a multiple of the teacher's patch of {source.patch} "
            f"pixels; use {nearest}, or remove it"
        )
    if settings.weights == "random" and load:
        text = "teacher.weights=random: the teacher is untrained; for tests only"
        logger.warning("%s", entry_message(text))
    tower = source.build(size, config.run.seed, load=load)
    if settings.precision == "fp8":
        for block in tower.blocks:
            use_float8(block, "teacher.precision")
        tower.source["precision"] = "fp8"
    outputs = TeacherOutputs.from_config(config, needs, len(tower.blocks))
    return OnlineTeacher(tower, outputs, size, grid)


def compute_dtype(config: Config) -> torch.dtype:
    """Return the dtype in which models compute."""
    return torch.bfloat16 if config.backend.precision == "bf16" else torch.float32
