"""``launchers/precompute_teacher.py --plan``: measures some seconds, and weighs caches by it."""

import argparse
import logging
import math
from dataclasses import replace
from pathlib import Path

import torch

from cmtmae_scale.cache.codecs import Codec
from cmtmae_scale.cache.format import Manifest
from cmtmae_scale.config.derive import needs, total_steps
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.method.student import MomentumEncoder, build_student
from cmtmae_scale.runtime.arguments import above_zero, at_least_one
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.collectives import pick_device
from cmtmae_scale.teachers.build import assemble, build_teacher_skeleton, compute_dtype
from cmtmae_scale.teachers.online import OnlineTeacher
from cmtmae_scale.tools.cache_plan.cost import Job, Prices, Rates, outlook
from cmtmae_scale.tools.cache_plan.rates import Measured, decoding_rate, store_rates, teacher_rate
from cmtmae_scale.tools.cache_plan.text import (
    hours,
    measured_lines,
    notes,
    rate_lines,
    table,
    taken_lines,
)
from cmtmae_scale.tools.estimate import count_operations
from dataloading.index import Index

logger = logging.getLogger(__name__)

COUNTS = (1, 4, 16)
MEASURE_S = 2.5
"""For each of teacher, decoding, writing and reading."""
NODE = 8
"""GPUs of a node, at most."""
CPU_BATCH = 4
"""On a CPU more pictures at once take longer and go no faster."""
FLAGS = ("gpus", "images_s", "gpu_hour", "tb_month")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what goes with ``--plan``."""
    group = parser.add_argument_group("with --plan")
    group.add_argument(
        "--gpus",
        type=at_least_one,
        metavar="N",
        help="GPUs that build and train; as many as processes were started",
    )
    group.add_argument(
        "--images-s",
        type=above_zero,
        metavar="RATE",
        help="images a second that one GPU trains on without its teacher (benchmark.py train with "
        "teacher.mode=cached, or a log); else modelled from the teacher's rate",
    )
    group.add_argument("--gpu-hour", type=above_zero, metavar="PRICE", help="price of a GPU-hour")
    group.add_argument(
        "--tb-month", type=above_zero, metavar="PRICE", help="price of 10^12 bytes for a month"
    )


def check_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what would have no effect."""
    given = [f"--{name.replace('_', '-')}" for name in FLAGS if getattr(options, name) is not None]
    if given and not options.plan:
        parser.error(f"{given[0]} goes with --plan")
    if (options.gpu_hour is None) != (options.tb_month is None):
        parser.error("--gpu-hour and --tb-month go together: one without the other misleads")


def plan_text(
    config: Config, options: argparse.Namespace, world: World, index: Index | None
) -> str:
    """Measure, and say what caches cost and save.

    Args:
        config: the run.
        options: parsed.
        world: this process's place.
        index: the images; ``None``: ``data.expected_images`` stands for them.

    Raises:
        ConfigError: a run that uses no teacher.
        CacheError: a store that refuses.
    """
    device = pick_device(world)
    codecs = usable_codecs(config)
    teacher = assemble(config, needs(config), load=False).to(device, compute_dtype(config))
    images = len(index) if index is not None else int(config.data.expected_images or 0)
    shapes: dict[Codec, Manifest] = {codec: shape(teacher, codec) for codec in codecs}
    chosen = config.cache.codec if config.cache.codec in shapes else codecs[0]
    logger.info("measuring for about %.0f s", 4 * MEASURE_S)
    measured = measure(config, teacher, index, shapes[chosen], device)
    given, on_gpu = options.images_s, device.type == "cuda"
    rates = choose_rates(measured, operations(config), given, on_gpu)
    draws = total_steps(config, images) * config.train.global_batch_size
    gpus = options.gpus or world.world_size
    job = Job(images, draws, gpus, config.cache.spot_check)
    prices = None
    if options.gpu_hour is not None:
        prices = Prices(options.gpu_hour, options.tb_month)
    counts = sorted({*COUNTS, config.views.views_per_image or 1})
    outlooks = [
        outlook(job, rates, codec, count, manifest.row_bytes(), prices)
        for codec, manifest in shapes.items()
        for count in counts
    ]
    facts = [
        *measured_lines(config, measured, teacher.dtype, device),
        *taken_lines(config, job, index is not None),
        *rate_lines(rates, measured, given is not None),
        f"  live run    {hours(outlooks[0].live_h)} h",
    ]
    told = notes(config, prices, given is None and not on_gpu)
    title = f"{config.run.name}: a cache of its teacher, or the teacher live"
    return "\n".join([title, "", *facts, "", table(outlooks, min(gpus, NODE)), "", *told])


def usable_codecs(config: Config) -> list[Codec]:
    """Codecs that hold what the run needs.

    Raises:
        ConfigError: if it needs nothing.
    """
    need = needs(config)
    if not need.teacher:
        raise ConfigError(
            "--plan: neither the mask nor the loss uses the teacher; there is nothing to cache"
        )
    return ["int8", "bf16"] if need.teacher_features else ["attention"]


def shape(teacher: OnlineTeacher, codec: Codec) -> Manifest:
    """A cache with the rows that ``Builder.describe`` names, and more of them than are written."""
    reading, (height, width) = teacher.reading, teacher.grid
    features = bool(reading.feature_layers)
    return Manifest(
        fingerprint={},
        recorded={},
        codec=codec,
        num_rows=2**20,
        rows_a_part=1024,
        patches=height * width if reading.attention_layers else 0,
        tokens=height * width + teacher.has_cls if features else 0,
        width=teacher.width if features else 0,
        calibration_sha256=None,
    )


def measure(
    config: Config,
    teacher: OnlineTeacher,
    index: Index | None,
    manifest: Manifest,
    device: torch.device,
) -> Measured:
    """Measure teacher, decoding and store one after the other."""
    batch = config.train.micro_batch_size
    if device.type == "cpu":
        batch = min(batch, CPU_BATCH)
    looked = teacher_rate(teacher, batch, device, MEASURE_S)
    decoded = None
    if index is not None:
        decoded = decoding_rate(config, index, teacher.image_size, device, MEASURE_S)
    folder = Path(str(config.cache.dir))
    store = store_rates(folder, manifest, config.train.micro_batch_size, MEASURE_S)
    return Measured(looked, batch, decoded, store)


def operations(config: Config) -> float:
    """Operations of the teacher's look at a view, divided by those of training on it."""
    live = replace(config, teacher=replace(config.teacher, mode="live"))
    with torch.device("meta"):
        teacher = build_teacher_skeleton(live)
        model = CollaborativeMAE(live, teacher.width)
        momentum = build_student(live, MomentumEncoder) if needs(live).momentum else None
    work = count_operations(live, model, momentum, teacher)
    return work.teacher / (work.student + work.momentum)


def choose_rates(found: Measured, ratio: float, given: float | None, on_gpu: bool) -> Rates:
    """Rates of a GPU: measured where there is one, else by operations.

    Args:
        found: figures of this machine.
        ratio: ``operations``.
        given: images a second that a GPU trains on without teacher.
        on_gpu: whether the teacher was measured on a GPU. If not, a given rate is another device's,
            and the teacher's follows from it.
    """
    teacher = found.teacher if on_gpu or given is None else given / ratio
    return Rates(
        teacher,
        given or teacher * ratio,
        math.inf if found.decode is None else found.decode,
        found.store.write,
        found.store.read,
    )
