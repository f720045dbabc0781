"""Numbers and needs that are derived from a config, and never stored."""

import math
import re
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from cmtmae_scale.config.schema import Config, NamedTeacher, Schedule, Student, Teacher, Trained
from cmtmae_scale.errors import CmtMaeError, ConfigError

SIZES = ("width", "depth", "heads")
"""Keys of ``student`` that replace sizes of its architecture."""
MIN_BATCHES = 4
"""Batches per epoch below which a run is warned about."""
MIN_STEPS = 50
"""Steps of a length in epochs below which a run is warned about."""


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


class BatchPlan(NamedTuple):
    """How the global batch is split over ranks and micro-steps."""

    global_batch_size: int
    micro_batch_size: int
    world_size: int
    accumulation: int

    def __str__(self) -> str:
        return (
            f"{self.global_batch_size} = {self.micro_batch_size} micro x {self.world_size} ranks "
            f"x {self.accumulation} accumulation"
        )


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


def used_teachers(config: Config) -> list[NamedTeacher]:
    """Return the entries of ``teachers`` that the mask or the loss uses, in order."""
    need = needs(config)
    return [
        one
        for one in config.teachers
        if (one.map > 0 and need.teacher_attention) or (one.loss > 0 and need.teacher_features)
    ]


def term_name(name: str) -> str:
    """Return a teacher's term, its name in losses, logs and weights; empty: a single teacher."""
    return f"teacher_{name}" if name else "teacher"


def has_pairs(config: Config) -> bool:
    """Whether the masks use the attention maps of two or more teachers."""
    maps = [one for one in config.teachers if one.map > 0]
    return needs(config).teacher_attention and len(maps) > 1


def teacher_shares(config: Config) -> dict[str, float]:
    """Return the weights of the teachers' terms in their mean by term; the sum is 1, if any."""
    if not needs(config).teacher_features:
        return {}
    if not config.teachers:
        return {term_name(""): 1.0}
    weights = {term_name(one.name): one.loss for one in config.teachers if one.loss > 0}
    whole = sum(weights.values())
    return {term: weight / whole for term, weight in weights.items()}


def has_teacher_mean(config: Config) -> bool:
    """Whether the log has a weighted mean of teachers' terms, ``loss/teacher``, beside them."""
    return bool(config.teachers) and bool(teacher_shares(config))


def loss_terms(config: Config) -> tuple[str, ...]:
    """Return the terms of a run's loss, in order: teachers, student, pixel."""
    need = needs(config)
    student, pixel = ("student",) * need.student_features, ("pixel",) * need.pixels
    return (*teacher_shares(config), *student, *pixel)


def find_scale_problem(config: Config) -> str | None:
    """Return why the weights of the targets do not weigh them alike, if they do not.

    Squared errors of ``l2`` are about 1/F of those of the other norms, over F channels.
    """
    norms = target_norms(config)
    terms = {name: norms[name] for name in loss_terms(config) if name in norms}
    small, others = ([n for n in terms if (terms[n] == "l2") == is_l2] for is_l2 in (True, False))
    if config.loss.type == "cosine" or not small or not others:
        return None
    return (
        f"loss.type={config.loss.type}: the norm of {', '.join(small)} is l2, with a mean square "
        f"of 1/F over F channels, that of {', '.join(others)} is not: they "
        "are not weighed alike; set all norms to ln, or loss.type=cosine"
    )


def target_norms(config: Config) -> dict[str, str]:
    """Return the norms of all features that may be targets, by term."""
    target = config.target
    own = {term_name(one.name): one.norm or target.teacher.norm for one in config.teachers}
    return {term_name(""): target.teacher.norm, **own, "student": target.student.norm}


def attention_map_weights(config: Config) -> dict[str, float]:
    """Return the weights of the teachers' attention maps by name, empty for a single teacher."""
    return {one.name: one.map for one in config.teachers} or {"": 1.0}


def teacher_config(config: Config, entry: NamedTeacher) -> Config:
    """Return the config of a run whose only teacher is an entry of ``teachers``.

    Teacher, attention map, target, cache and what the run needs of the teacher are the entry's.
    """
    attention, target = config.attention, config.target.teacher
    mixing, loss = config.collaboration, config.loss
    return replace(
        config,
        teachers=[],
        teacher=Teacher(**{one.name: getattr(entry, one.name) for one in fields(Teacher)}),
        attention=replace(
            attention,
            source=entry.attention_source or attention.source,
            layers=entry.attention_layers or attention.layers,
        ),
        target=replace(
            config.target,
            teacher=replace(
                target, norm=entry.norm or target.norm, layers=entry.layers or target.layers
            ),
        ),
        collaboration=mixing if entry.map > 0 else replace(mixing, alpha_attention=0.0),
        loss=loss if entry.loss > 0 else replace(loss, teacher=0.0),
        cache=replace(config.cache, dir=entry_cache_dir(config, entry)),
    )


def entry_cache_dir(config: Config, entry: NamedTeacher) -> str | None:
    """Return the folder of the cache of an entry of ``teachers``, if there is one."""
    if entry.cache_dir:
        return entry.cache_dir
    if config.cache.dir or entry.mode == "sidecar":
        return str(cache_folder(config) / entry.name)
    return None


def teacher_configs(config: Config) -> dict[str, Config]:
    """Return one config per teacher that the run uses, by name; each has a single teacher.

    Without ``teachers`` it is the config itself under an empty name, whether or not it is used.
    """
    if not config.teachers:
        return {"": config}
    return {one.name: teacher_config(config, one) for one in used_teachers(config)}


def pick_teacher(config: Config, name: str | None, option: str = "--teacher ") -> Config:
    """Return the config of the teacher of a name; without ``teachers`` there is no name to give.

    ``option`` is what gives the name, for messages.

    Raises:
        ConfigError: lists the names.
    """
    names = [one.name for one in config.teachers]
    if not names and name is None:
        return config
    if name in names:
        return teacher_config(config, config.teachers[names.index(name)])
    if not names:
        raise ConfigError(f"{option}{name}: there is a single teacher; omit the name")
    found = "" if name is None else f"; found {option}{name}"
    raise ConfigError(
        f"there are several teachers; give {option}NAME, NAME one of {', '.join(names)}{found}"
    )


ENTRY_KEYS = {
    "attention.source": "attention_source",
    "attention.layers": "attention_layers",
    "target.teacher.norm": "norm",
    "target.teacher.layers": "layers",
    "cache.dir": "cache_dir",
}
"""Keys that an entry of ``teachers`` replaces, and their names there."""
_entry: ContextVar[str] = ContextVar("entry", default="")
"""Name of the entry of ``teachers`` whose errors ``entry_errors`` names."""


def entry_text(text: str, name: str) -> str:
    """Return a message about a single teacher with the keys of an entry of ``teachers``.

    A message without any begins with the entry; ``name`` may be empty, for a single teacher.
    """
    if not name:
        return text
    for key, own in ENTRY_KEYS.items():
        text = re.sub(rf"(?<![\w.]){re.escape(key)}\b", f"teachers.{name}.{own}", text)
    keys = "|".join(one.name for one in fields(NamedTeacher))
    text = re.sub(rf"(?<![\w.])teacher\.(?=({keys})\b)", f"teachers.{name}.", text)
    return text if f"teachers.{name}" in text else f"teachers.{name}: {text}"


@contextmanager
def entry_errors(name: str) -> Generator[None, None, None]:
    """Let errors name the keys of an entry of ``teachers``, see ``entry_text``.

    What the block logs names them where it is given through ``entry_message``.
    """
    before = _entry.set(name)
    try:
        yield
    except CmtMaeError as error:
        text = entry_text(str(error), name)
        if text == str(error):
            raise
        raise type(error)(text) from error.__cause__
    finally:
        _entry.reset(before)


def entry_message(text: str) -> str:
    """Return a message about a single teacher with the keys of the entry that is being built."""
    return entry_text(text, _entry.get())


def has_rows(teacher: Teacher) -> bool:
    """Whether the rows of a teacher are read from a cache."""
    return teacher.mode in ("cached", "sidecar")


def reads_cache(config: Config) -> bool:
    """Whether the rows of any teacher are read from a cache."""
    return any(map(has_rows, config.teachers or [config.teacher]))


def cache_folder(config: Config) -> Path:
    """Return the folder of the cache; the default is the run's own."""
    return Path(config.cache.dir) if config.cache.dir else Path(config.run.output_dir) / "cache"


def online_fraction(config: Config) -> float:
    """Return the expected share of micro-batches in which the single teacher runs."""
    if not needs(config).teacher or config.teacher.mode == "none":
        return 0.0
    return config.cache.spot_check if reads_cache(config) else 1.0


def builds_teacher(config: Config) -> bool:
    """Whether a training process builds a teacher, which cache misses may need."""
    if config.teachers:
        return any(map(builds_teacher, teacher_configs(config).values()))
    misses = reads_cache(config) and config.cache.on_miss == "online"
    return online_fraction(config) > 0 or (misses and needs(config).teacher)


def pairs_views(config: Trained) -> bool:
    """Whether mixup or cutmix pairs the views of a micro-batch, which then has an even size."""
    augment = getattr(config, "augment", None)
    return augment is not None and bool(augment.mixup or augment.cutmix)


def batch_plan(config: Trained, world_size: int) -> BatchPlan:
    """Split the global batch over ranks and micro-steps.

    The micro-batch is the largest divisor of ``global_batch_size / world_size`` that is at most
    ``train.micro_batch_size``; it is even where views are paired.

    Raises:
        ConfigError: if the ranks cannot share the batch; names world sizes and batches that work.
    """
    unit = 2 if pairs_views(config) else 1
    return split_batch(
        config.train.global_batch_size, config.train.micro_batch_size, world_size, unit
    )


def split_batch(total: int, limit: int, world_size: int, unit: int = 1) -> BatchPlan:
    """Split ``total`` views over ranks into micro-batches of at most ``limit``, see ``batch_plan``.

    Args:
        total: views per step.
        limit: largest number of views per rank and forward.
        world_size: number of ranks.
        unit: the micro-batch is a multiple of it.
    """
    if total % (world_size * unit):
        raise ConfigError(refuse_batch(total, world_size, unit))
    share = total // world_size
    if limit < unit:
        raise ConfigError(refuse_single_views(limit))
    micro = next(size for size in range(min(limit, share), 0, -1) if fits(share, size, unit))
    return BatchPlan(total, micro, world_size, share // micro)


def fits(share: int, size: int, unit: int) -> bool:
    """Whether micro-batches of ``size``, a multiple of ``unit``, make up a rank's share."""
    return share % size == 0 and size % unit == 0


def refuse_single_views(limit: int) -> str:
    """Return why a micro-batch of one view cannot be paired."""
    return (
        f"train.micro_batch_size={limit}: mixup and cutmix pair the views of a micro-batch; use 2 "
        "or more, or set augment.mixup=0 and augment.cutmix=0"
    )


def refuse_batch(total: int, world_size: int, unit: int) -> str:
    """Return why the ranks cannot share a batch; the first remedy keeps the experiment."""
    pairs = total // unit if total % unit == 0 else 0
    below = next((n for n in range(min(world_size, pairs), 0, -1) if pairs % n == 0), None)
    most = min(pairs, 8 * world_size)
    above = next((n for n in range(world_size + 1, most + 1) if pairs % n == 0), None)
    counts = [f"{n} rank{'s' if n > 1 else ''}" for n in (below, above) if n is not None]
    step = world_size * unit
    sizes = [str(size) for size in (total // step * step, -(-total // step) * step) if size]
    each = "an even number of views" if unit > 1 else "a whole number of views"
    other = f"train.global_batch_size={' or '.join(dict.fromkeys(sizes))}, which changes the run"
    return (
        f"train.global_batch_size={total} cannot be shared by {world_size} "
        f"rank{'s' if world_size > 1 else ''}, {each} each; use "
        f"{' or '.join([*counts, other])}"
    )


def explain_batch(config: Trained, plan: BatchPlan) -> str:
    """Return the split of the batch, and why the micro-batch is below the configured limit."""
    limit = config.train.micro_batch_size
    if plan.micro_batch_size == limit:
        return str(plan)
    share = plan.global_batch_size // plan.world_size
    even = "even " if pairs_views(config) else ""
    return (
        f"{plan}; {plan.micro_batch_size} is the largest {even}divisor of the {share} views per "
        f"rank up to train.micro_batch_size={limit}"
    )


def total_steps(config: Trained, num_images: int) -> int:
    """Return the steps of the whole run: as given, or epochs * images / batch, rounded up."""
    if config.train.steps is not None:
        return config.train.steps
    if config.train.epochs is None:
        raise ConfigError("train.epochs and train.steps are both missing; give one of them")
    views = exact(config.train.epochs) * num_images
    return max(1, math.ceil(views / config.train.global_batch_size))


def exact(number: float) -> Fraction:
    """Return a number as it is written: 1.1 epochs of 1,000 images are 1,100 views, not 1,101."""
    return Fraction(str(number))


def find_length_problem(config: Trained, num_images: int) -> str | None:
    """Return why a run is unlikely to learn: its batch against its images, or its length.

    A length in steps is as the user wants it, and not judged.
    """
    batch, steps = config.train.global_batch_size, total_steps(config, num_images)
    if batch * MIN_BATCHES > num_images:
        most = num_images // MIN_BATCHES
        remedy = f"set train.global_batch_size={most} or less" if most > 1 else "add images"
        return (
            f"train.global_batch_size={batch}: an epoch of {num_images} images has "
            f"{num_images / batch:.2g} batches, fewer than {MIN_BATCHES}; {remedy}"
        )
    if config.train.steps is None and steps < MIN_STEPS:
        return (
            f"train.epochs={config.train.epochs:g} over {num_images} images are {steps} steps of "
            f"{batch}; set train.epochs={math.ceil(MIN_STEPS * batch / num_images)} or more"
        )
    return None


def loaded_start(student: Student) -> tuple[str, str] | None:
    """Return the key that loads the initial weights, and its value; ``None``: none are loaded."""
    if student.init_from_run is not None:
        return "student.init_from_run", student.init_from_run
    if student.init_weights is not None:
        return "student.init_weights", student.init_weights
    return None


def replaced_sizes(student: Student) -> dict[str, int]:
    """Return width, depth and heads, where they are not the architecture's own."""
    sizes: dict[str, int | None] = {name: getattr(student, name) for name in SIZES}
    return {name: size for name, size in sizes.items() if size is not None}


def name_student(student: Student) -> str:
    """Return the architecture's name, with the sizes that replace its own."""
    sizes = ", ".join(f"{name} {size}" for name, size in replaced_sizes(student).items())
    return f"{student.arch} of {sizes}" if sizes else student.arch


def peak_lr(config: Config) -> float:
    """Return the learning rate after warm-up: ``base_lr * global_batch_size / 256``."""
    return config.optimizer.base_lr * config.train.global_batch_size / 256
