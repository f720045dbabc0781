"""Figures during a run: the same images each time, with weights gathered from all ranks."""

import time
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtmae_scale.backends.gather import gather_tensors
from cmtmae_scale.cache.teacher import CachedTeacher, SidecarTeacher
from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import teacher_configs
from cmtmae_scale.engine.progress import Progress
from cmtmae_scale.engine.task import Run, SideTask
from cmtmae_scale.method.build import build_student
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.method.schedules import evaluate
from cmtmae_scale.method.student import MomentumEncoder
from cmtmae_scale.pretraining.scalars import scalars_at
from cmtmae_scale.pretraining.task import Pretraining
from cmtmae_scale.teachers.base import Teacher, TeacherSource, feature_widths, view_sizes
from cmtmae_scale.teachers.online import OnlineTeacher
from cmtmae_scale.tools.figures.columns import Networks, compute_columns
from cmtmae_scale.tools.figures.sheet import draw_sheet
from dataloading.errors import DataError
from dataloading.index import Index
from dataloading.one_pass import OnePass

COUNT = 8
"""Images per sheet."""
PREFIXES = ("model.", "momentum.")


class RunFigures:
    """Draws figure sheets every ``log.images_every`` steps and at the end.

    All ranks gather the weights; rank 0 keeps them on the host and draws with networks of its own,
    so the training is not affected.

    Args:
        task: the pre-training, with ``log.images_every``.
        index: the run's images; centre crops of some, evenly spread over the index, are drawn.
    """

    def __init__(self, task: Pretraining, index: Index) -> None:
        self.config, self.device, self.models = task.config, task.device, task.models
        self.index = index
        self.every = task.config.log.images_every
        self.draws = task.world.rank == 0
        self.images: tuple[Tensor, ...] | None = None
        self.networks: Networks | None = None
        if self.draws:
            teachers, momentum = task.models.teachers, None
            with torch.random.fork_rng(devices=[]):
                model = CollaborativeMAE(self.config, feature_widths(teachers))
                if needs(self.config).momentum:
                    momentum = build_student(self.config, MomentumEncoder)
            self.networks = Networks(online_teachers(teachers), model.eval(), momentum)

    def is_due(self, progress: Progress) -> bool:
        if self.every is None:
            return False
        return progress.step % self.every == 0 or progress.step == progress.end_step

    def run(self, run: Run) -> None:
        """Draw and record a sheet. A collective."""
        began = time.monotonic()
        sheet = self.draw(run.progress)
        if run.telemetry is not None and sheet is not None:
            run.telemetry.record_figures(run.progress.step, sheet, time.monotonic() - began)

    def draw(self, progress: Progress) -> NDArray[np.uint8] | None:
        """Draw the present weights. A collective.

        Returns:
            The sheet, ``[height, width, 3]``, on rank 0.

        Raises:
            DataError: on rank 0, if the images cannot be read.
        """
        fragments = self.models.backend.fragments()
        for prefix in PREFIXES:
            gathered = gather_tensors(fragments, prefix)
            state = {name: value.cpu() for name, value in gathered if self.draws}
            if self.networks is not None and state:
                self.networks.trained(prefix).load_state_dict(state, strict=True)
        if self.networks is None:
            return None
        if self.images is None:
            sizes = view_sizes(self.config.views.image_size, self.networks.teachers)
            self.images = read_crops(self.index, sizes, self.config.data.workers, self.device)
        scalars = scalars_at(self.config, progress.fraction)
        layout = self.models.layout
        scalings = self.models.channels.scalings
        columns = compute_columns(
            self.config, self.networks, layout, self.images, scalars, scalings
        )
        return draw_sheet(columns, sheet_title(self.config, progress))


def open_figures(run: Run) -> list[SideTask]:
    """Return the side task that draws a pre-training; none where ``log.images_every`` is off."""
    task = run.task
    if not isinstance(task, Pretraining) or task.config.log.images_every is None:
        return []
    figures = RunFigures(task, run.index)
    return [SideTask("figures", figures.is_due, figures.run)]


def online_teachers(teachers: Mapping[str, TeacherSource]) -> dict[str, Teacher]:
    """Return the teacher models themselves by name: no cache holds the drawn views."""
    models = {name: online_teacher(source) for name, source in teachers.items()}
    return {name: model for name, model in models.items() if model is not None}


def online_teacher(source: TeacherSource) -> Teacher | None:
    """Return the model of a source, if the process has it."""
    if isinstance(source, CachedTeacher | SidecarTeacher):
        return source.online
    return source if isinstance(source, OnlineTeacher) else None


def read_crops(
    index: Index, sizes: tuple[int, ...], threads: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Read centre crops of some decodable images, evenly spread over the index.

    Returns:
        uint8 ``[n, S, S, 3]`` for each size S.

    Raises:
        DataError: if images cannot be read, or none can be decoded.
    """
    ids = np.unique(np.linspace(0, len(index) - 1, COUNT).round().astype(np.int64))
    crops: list[Tensor] = []
    for size in sizes:
        with OnePass(
            index,
            ids,
            micro_batch=len(ids),
            size=size,
            threads=threads,
            decode="torch",
            patience_s=0.0,
        ) as images:
            batch = next(images)
        if not bool(batch.valid.any()):
            raise DataError(f"none of the {len(ids)} images to be drawn can be decoded")
        crops.append(batch.images[0][batch.valid].to(device))
    return tuple(crops)


def sheet_title(config: Config, progress: Progress) -> str:
    """Return a title with step, teachers, sampler and mixing weight."""
    parts = [f"step {progress.step}"]
    need = needs(config)
    for name, alone in teacher_configs(config).items() if need.teacher else ():
        random = " (RANDOM WEIGHTS)" if alone.teacher.weights == "random" else ""
        label = f"teacher {name}: " if name else "teacher "
        parts.append(f"{label}{alone.teacher.model}{random}")
    parts.append(f"{config.mask.ratio:.0%} masked by {config.mask.sampler}")
    if need.teacher_attention and need.student_attention:
        alpha = evaluate(config.collaboration.alpha_attention, progress.fraction)
        whose = "teachers'" if config.teachers else "teacher's"
        parts.append(f"{whose} weight in the mix {alpha:g}")
    return ", ".join(parts)
