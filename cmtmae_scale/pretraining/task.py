"""Pre-training as a task of the engine."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmtmae_scale.backends.base import Backend
from cmtmae_scale.config.batch import find_length_problem
from cmtmae_scale.config.changes import PRETRAINING_FREE_KEYS
from cmtmae_scale.config.derive import find_scale_problem, find_unloaded_weights, loss_terms
from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import (
    entry_errors,
    has_pairs,
    has_teacher_mean,
    reads_cache,
    teacher_configs,
    used_teachers,
)
from cmtmae_scale.engine.progress import Progress
from cmtmae_scale.engine.stop import StopRequest
from cmtmae_scale.engine.task import Run, SideTask
from cmtmae_scale.errors import TeacherError
from cmtmae_scale.evaluation.periodic import open_evaluation
from cmtmae_scale.pretraining.build import build_models, open_index, open_stream, open_teachers
from cmtmae_scale.pretraining.diagnostics import Diagnostics
from cmtmae_scale.pretraining.init_from_run import PRIOR_STEPS
from cmtmae_scale.pretraining.prepare import MicroBatch, Models, prepare
from cmtmae_scale.pretraining.scalars import PretrainingScalars, scalars_at
from cmtmae_scale.pretraining.teacher_weights import compare_weights
from cmtmae_scale.runtime.collectives import gather_texts
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.teachers.base import TeacherView, forward_all, view_sizes
from dataloading.index import Index
from dataloading.stream import Batch, Stream

logger = logging.getLogger(__name__)

SHOWN_SAMPLES = 4
"""Samples that an error names per rank."""
EVALUATION_FRACTION = 0.05
"""Fraction of a run's time above which evaluation causes a warning."""
TEACHER_AGREEMENT = "attention/teacher_agreement"
OBSERVED = ("mask/visible_mass", "attention/agreement", "cache/hit", "teacher/not_finite")


class Pretraining:
    """CMT-MAE and its baselines.

    Args:
        config: checked settings.
        world: place of this process.
        device: device of this rank.
    """

    name = "pre-training"
    terms: tuple[str, ...]
    logged: tuple[str, ...]
    free_keys: tuple[str, ...] = PRETRAINING_FREE_KEYS

    index: Index
    models: Models
    view_sizes: Sequence[int]
    prior_steps: int
    teacher_weights: dict[str, dict[str, str]]

    def __init__(self, config: Config, world: World, device: torch.device) -> None:
        self.config, self.world, self.device = config, world, device
        self.side_tasks: list[SideTask] = []
        self.has_warned = False
        self.diagnostics = Diagnostics(config)
        self.drawn: list[tuple[Tensor, Mapping[str, Tensor]]] = []
        """Sample ids of the step's micro-batches, and which of them each teacher fails on."""
        needed = needs(config)
        maps = (needed.teacher_attention, needed.student_attention)
        # A term that the run lacks is not logged: a zero would be taken for a measurement.
        present = (any(maps), all(maps), reads_cache(config), False)
        found = [name for name, is_present in zip(OBSERVED, present, strict=True) if is_present]
        mean = ("teacher",) * has_teacher_mean(config)
        losses = [f"loss/{name}" for name in ("total", *mean, *loss_terms(config))]
        of_pairs = [TEACHER_AGREEMENT] if has_pairs(config) else []
        self.terms = (*losses, *OBSERVED, *of_pairs)
        self.logged = (*losses, *found, *of_pairs)

    def open_index(self, run_dir: Path) -> Index:
        self.index = open_index(self.config, run_dir)
        if self.world.rank == 0:
            self.warn_of_settings()
        return self.index

    def warn_of_settings(self) -> None:
        """Warn of settings that can be trained, but are probably unintended."""
        config = self.config
        length, scale = find_length_problem(config, len(self.index)), find_scale_problem(config)
        unused = [one.name for one in config.teachers if one not in used_teachers(config)]
        names = f"teachers: neither loss nor mask uses {', '.join(unused)}, which are not built"
        weights = find_unloaded_weights(config.student)
        for problem in (length, scale, weights, names if unused else None):
            if problem is not None:
                logger.warning("%s", problem)

    def build(self, saved: dict[str, Any] | None, stop: StopRequest, stack: ExitStack) -> Backend:
        config, world, device = self.config, self.world, self.device
        teachers = open_teachers(config, world, device, self.index, stop, stack)
        self.teacher_weights = compare_weights(config, teachers, saved)
        self.view_sizes = view_sizes(config.views.image_size, teachers)
        self.models = build_models(config, world, device, teachers, resumed=saved is not None)
        self.prior_steps = self.models.prior_steps if saved is None else saved.get(PRIOR_STEPS, 0)
        evaluation, every = open_evaluation(config, world, device), config.eval.every
        if evaluation is not None and every is not None:

            def evaluate(run: Run) -> None:
                began = time.monotonic()
                values = evaluation(run.backend)
                if run.telemetry is not None:
                    took_s = time.monotonic() - began
                    fraction = run.telemetry.record_side_task(
                        "eval", run.progress.step, values, took_s
                    )
                    self.warn_of_cost(fraction, took_s)

            self.side_tasks.append(SideTask("evaluation", is_every(every), evaluate))
        diagnostics = self.diagnostics
        diagnostics.scaling = self.models.channels.scalings.get("student")
        self.side_tasks.append(SideTask("diagnostics", diagnostics.is_due, diagnostics.run))
        return self.models.backend

    def warn_of_cost(self, fraction: float, took_s: float) -> None:
        """Warn once if evaluation takes more than ``EVALUATION_FRACTION`` of the time."""
        if fraction > EVALUATION_FRACTION and not self.has_warned:
            self.has_warned = True
            logger.warning(
                "evaluation has taken %.0f %% of the time since the launch, %.1f s for this one; "
                "raise eval.every, or name fewer images in eval.train_path and eval.test_path",
                100 * fraction,
                took_s,
            )

    def open_stream(self, position: int) -> Stream:
        models = self.models
        return open_stream(
            self.config, self.index, self.world, self.device, models.teachers, position
        )

    def scalars(self, progress: Progress) -> PretrainingScalars:
        self.diagnostics.expect(progress.step + 1)
        self.drawn.clear()
        self.models.channels.clear_sums()
        return scalars_at(self.config, progress.fraction)

    def prepare_fixed(self, batch: Batch) -> dict[str, TeacherView]:
        """See ``Task.prepare_fixed``: the teachers' outputs by name."""
        return forward_all(self.models.teachers, batch)

    def prepare(
        self, batch: Batch, fixed: dict[str, TeacherView], scalars: PretrainingScalars
    ) -> tuple[MicroBatch, Sequence[Tensor]]:
        micro_batch, observed = prepare(self.config, self.models, batch, fixed, scalars)
        self.diagnostics.keep(micro_batch)
        self.drawn.append((batch.sample_id, micro_batch.unsound))
        self.models.channels.add(micro_batch.channel_sums)
        return micro_batch, [one for one in observed if one is not None]

    def check_inputs(self, step: int) -> None:
        """See ``Task.check_inputs``: refuse views on which a frozen teacher fails."""
        for name, alone in teacher_configs(self.config).items():
            with entry_errors(name):
                self.check_teacher(step, name, alone)

    def check_teacher(self, step: int, name: str, config: Config) -> None:
        """Refuse views on which a teacher fails; ``config`` names only this teacher."""
        drawn = [(ids, bad[name]) for ids, bad in self.drawn if name in bad]
        ids = [int(i) for each, bad in drawn for i in each[bad.cpu()].cpu()]
        names = ", ".join(f"{i} ({self.index.names[i]})" for i in ids[:SHOWN_SAMPLES])
        more = f" and {len(ids) - SHOWN_SAMPLES} more" if len(ids) > SHOWN_SAMPLES else ""
        everyone = gather_texts(names + more)
        failed = {str(rank): text for rank, text in enumerate(everyone) if text}
        if not failed:
            return
        remedy = "set backend.precision=fp32, or use other teacher.weights in another run"
        source = f"teacher.model={config.teacher.model}"
        if reads_cache(config):
            source += f" or its cache.dir={config.cache.dir}"
            remedy += ", or build the cache again"
        raise TeacherError(
            f"step {step} was not taken: the output of {source} is not finite on ranks "
            f"{', '.join(failed)}, for samples {'; '.join(failed.values())}, which could be "
            f"decoded; nothing was updated; {remedy}"
        )

    def step_sums(self) -> Tensor:
        """See ``Task.step_sums``: sums per channel of the targets."""
        return self.models.channels.sums

    def record_applied(self, sums: Sequence[float]) -> None:
        """See ``Task.record_applied``: update the running statistics of the targets."""
        self.models.channels.update(sums)

    def saved_state(self) -> dict[str, Any]:
        prior = {PRIOR_STEPS: self.prior_steps} if self.prior_steps else {}
        return self.models.channels.to_dict() | self.teacher_weights | prior

    def restore(self, saved: dict[str, Any]) -> None:
        self.models.channels.restore(saved)

    def conclude(self, run: Run) -> None:
        self.diagnostics.conclude(run)


def is_every(steps: int) -> Callable[[Progress], bool]:
    """Return a function that checks whether the last step is a multiple of ``steps``."""
    return lambda progress: progress.step % steps == 0
