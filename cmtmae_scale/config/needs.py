"""Which attention maps and features a run uses."""

from typing import NamedTuple

from cmtmae_scale.config.schema import Config, Schedule


class Needs(NamedTuple):
    """Attention maps and features that a run uses; nothing else is built."""

    teacher_attention: bool
    teacher_features: bool
    student_attention: bool
    student_features: bool
    pixels: bool

    @property
    def teacher(self) -> bool:
        """Whether a frozen teacher is built."""
        return self.teacher_attention or self.teacher_features

    @property
    def momentum(self) -> bool:
        """Whether a momentum encoder is built."""
        return self.student_attention or self.student_features


def extremes(schedule: Schedule | float) -> tuple[float, float]:
    """Return the smallest and the largest value of a schedule over a run."""
    if not isinstance(schedule, Schedule):
        return float(schedule), float(schedule)
    values = [schedule.start] if schedule.end is None else [schedule.start, schedule.end]
    return min(values), max(values)


def needs(config: Config) -> Needs:
    """Return which attention maps and features a run uses at any time.

    Source: docs/method.md, section "Build only what is needed".
    """
    attention = config.mask.sampler != "random"
    attention_low, attention_high = extremes(config.collaboration.alpha_attention)
    target_low, target_high = extremes(config.collaboration.alpha_target)
    several = config.teachers
    has_map = not several or any(one.map > 0 for one in several)
    has_features = not several or any(one.loss > 0 for one in several)
    return Needs(
        teacher_attention=has_map and attention and attention_high > 0,
        teacher_features=has_features and config.loss.teacher > 0 and target_high > 0,
        student_attention=attention and attention_low < 1,
        student_features=config.loss.student > 0 and target_low < 1,
        pixels=config.loss.pixel > 0,
    )
