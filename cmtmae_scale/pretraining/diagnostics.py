"""Diagnostics of a run: whether target tokens collapse, and which loss term drives the gradient."""

import logging
import math
import time

import torch

from cmtmae_scale.config.derive import loss_terms
from cmtmae_scale.config.schema import Config
from cmtmae_scale.engine.progress import Progress
from cmtmae_scale.engine.summary import last_values
from cmtmae_scale.engine.task import Run
from cmtmae_scale.engine.telemetry import LOG_FILE
from cmtmae_scale.method.channels import ChannelScaling
from cmtmae_scale.method.diagnostics import constant_loss, token_diagnostics
from cmtmae_scale.method.targets import normalise
from cmtmae_scale.pretraining.collapse import CONSTANT, COSINE, RANK, describe_collapse
from cmtmae_scale.pretraining.prepare import MicroBatch

logger = logging.getLogger(__name__)

PATIENCE = 3
"""Consecutive intervals after which collapsing tokens cause a warning."""
REMEDIES = (
    "early in a run this may pass; else lower optimizer.base_lr, raise collaboration.alpha_target "
    "or momentum.start, or start a run with target.teacher.norm=instance "
    "target.student.norm=instance"
)


class Diagnostics:
    """Measures every ``log.diagnostics_every`` steps, on the last micro-batch of the step.

    Weights, moments and EMA keep their bits: the gradients are computed and dropped.

    Args:
        config: checked settings.
    """

    def __init__(self, config: Config) -> None:
        self.every = config.log.diagnostics_every
        self.norm, self.loss = config.target.student.norm, config.loss
        self.scaling: ChannelScaling | None = None
        """Of the momentum encoder's target, where its norm uses running statistics."""
        self.terms = loss_terms(config)
        self.is_wanted = False
        self.kept: MicroBatch | None = None
        self.collapsing = 0

    def expect(self, step: int) -> None:
        """Prepare for a step: micro-batches are kept where the step is measured."""
        self.is_wanted = self.every is not None and step % self.every == 0
        self.kept = None

    def keep(self, micro_batch: MicroBatch) -> None:
        """Keep a micro-batch of a step that is measured."""
        if self.is_wanted:
            self.kept = micro_batch

    def is_due(self, progress: Progress) -> bool:
        return self.kept is not None

    def run(self, run: Run) -> None:
        """Measure and log. A collective."""
        began, micro_batch, self.kept = time.monotonic(), self.kept, None
        if micro_batch is None:
            return
        values = self.measure_tokens(run, micro_batch) | self.measure_gradients(run, micro_batch)
        dropped = [name for name, value in values.items() if not math.isfinite(value)]
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if run.telemetry is not None:
            took_s = time.monotonic() - began
            run.telemetry.record_side_task("diagnostics", run.progress.step, values, took_s)
            self.warn_of_collapse(run, values)
            if dropped:
                text = "step %d: diagnostics that are not finite are not logged: %s"
                logger.warning(text, run.progress.step, ", ".join(dropped))

    def measure_tokens(self, run: Run, micro_batch: MicroBatch) -> dict[str, float]:
        """Measure the momentum encoder's target tokens of this rank's decodable views."""
        features, _ = run.backend.momentum_forward(micro_batch.images)
        valid = micro_batch.valid.view(len(micro_batch.images), -1)[:, 0]  # [B] of [R]
        if features is None or "student" not in self.terms or not bool(valid.any()):
            return {}
        num_prefix = features.shape[1] - sum(ids.shape[1] for ids in micro_batch.choice)
        tokens = normalise(features, self.norm, num_prefix, self.scaling)[valid, num_prefix:]
        rank, cosine = token_diagnostics(tokens)
        return {
            RANK: float(rank),
            COSINE: float(cosine),
            CONSTANT: float(constant_loss(tokens, self.loss.type, self.loss.beta)),
        }

    def measure_gradients(self, run: Run, micro_batch: MicroBatch) -> dict[str, float]:
        """Measure each term's fraction of the sum of the terms' gradient norms, over all ranks."""
        if len(self.terms) < 2:
            return {}
        norms: dict[str, float] = {}
        for term in self.terms:
            run.backend.micro(micro_batch._replace(only_term=term), last=True)
            report = torch.zeros(1, device=run.device)
            norms[term] = run.backend.step(0.0, report, lambda sums: False).grad_norm
        total = sum(norms.values())
        if not total:  # no valid row: zeros would be taken for a measurement
            return {}
        return {f"diagnostics/gradient/{term}": norm / total for term, norm in norms.items()}

    def warn_of_collapse(self, run: Run, values: dict[str, float]) -> None:
        """Warn when target tokens have been nearly alike for ``PATIENCE`` intervals."""
        found = describe_collapse(values)
        self.collapsing = self.collapsing + 1 if found else 0
        if found and self.collapsing == PATIENCE:
            why = f"for {PATIENCE} intervals, most recently {found}; {REMEDIES}"
            run.record_incident("target tokens collapse", why)

    def conclude(self, run: Run) -> None:
        """Warn at the end of a complete run if the last target tokens were nearly alike."""
        if run.telemetry is None:
            return
        last = last_values(run.run_dir / LOG_FILE)
        found = describe_collapse({name: value for name, (_, value) in last.items()})
        if found:
            text = "at step %d the momentum encoder's target tokens are nearly alike: %s; %s"
            logger.warning(text, last[RANK][0], found, REMEDIES)
