"""The scheduled numbers of fine-tuning."""

import math

from cmtmae_scale.config.finetune import Finetune
from cmtmae_scale.engine.scalars import Scalars


def scalars_at(config: Finetune, fraction: float, epochs: float) -> Scalars:
    """Evaluate all schedules at a fraction of the run.

    Args:
        config: checked settings.
        fraction: u = position / horizon.
        epochs: passes over the images of the whole run.

    Returns:
        The learning rate of the head; there is no momentum encoder.
    """
    optimizer = config.optimizer
    peak = optimizer.base_lr * config.train.global_batch_size / 256
    warmup, lowest = optimizer.warmup_epochs, optimizer.min_lr
    lr = epoch_learning_rate(fraction * epochs, epochs, peak, warmup, lowest)
    return Scalars(lr, momentum=None)


def epoch_learning_rate(
    epoch: float, epochs: float, peak: float, warmup: float, lowest: float
) -> float:
    """Return the learning rate: linear warm-up from 0, then a half cosine to ``lowest``.

    Args:
        epoch: passes over the images so far.
        epochs: passes of the whole run, above ``warmup``.
        peak: rate at the end of the warm-up.
        warmup: passes with rising rate.
        lowest: rate at the end.

    Source: MAE's ``util/lr_sched.py``.
    """
    if epoch < warmup:
        return peak * epoch / warmup
    fraction = min((epoch - warmup) / (epochs - warmup), 1.0)
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * fraction)) / 2
