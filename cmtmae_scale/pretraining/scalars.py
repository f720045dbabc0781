"""The scheduled numbers of pre-training."""

from dataclasses import dataclass

from cmtmae_scale.config.derive import peak_lr
from cmtmae_scale.config.schema import Config
from cmtmae_scale.engine.scalars import Scalars
from cmtmae_scale.method.schedules import evaluate, learning_rate, momentum_at


@dataclass(frozen=True)
class PretrainingScalars(Scalars):
    """Every scheduled number of one step."""

    alpha_attention: float
    alpha_target: float
    salient_fraction: float

    @property
    def mixing(self) -> list[float]:
        """Return the numbers that decide what the loss compares."""
        return [self.alpha_attention, self.alpha_target, self.salient_fraction]


def scalars_at(config: Config, fraction: float) -> PretrainingScalars:
    """Evaluate all schedules at a fraction of the run, u = position / horizon."""
    return PretrainingScalars(
        lr=learning_rate(fraction, peak_lr(config), config.optimizer.warmup_fraction),
        momentum=momentum_at(config.momentum, fraction),
        alpha_attention=evaluate(config.collaboration.alpha_attention, fraction),
        alpha_target=evaluate(config.collaboration.alpha_target, fraction),
        salient_fraction=evaluate(config.mask.salient_fraction, fraction),
    )
