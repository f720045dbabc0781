"""A teacher cache against the online teacher: reading, decoding and the training step."""

import logging
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NoReturn

import torch

from cmtmae_scale.cache.build import Builder, build_shards
from cmtmae_scale.cache.codecs import Calibration, Codec
from cmtmae_scale.cache.teacher import CachedTeacher
from cmtmae_scale.config.batch import batch_plan
from cmtmae_scale.config.images import open_images
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.teachers.base import view_sizes
from cmtmae_scale.teachers.build import assemble_teacher, compute_dtype
from cmtmae_scale.teachers.online import OnlineTeacher
from cmtmae_scale.tools.benchmark import cache_speed, rounding, training
from cmtmae_scale.tools.benchmark.cache_speed import BuiltCache, ViewRate
from cmtmae_scale.tools.benchmark.clock import Spread
from cmtmae_scale.tools.benchmark.rig import SyntheticTeacher
from cmtmae_scale.tools.benchmark.table import markdown_table, training_tables
from cmtmae_scale.tools.benchmark.training import Protocol, Variant
from dataloading.index import Index
from dataloading.stream import Stream

logger = logging.getLogger(__name__)

CODECS: tuple[Codec, ...] = ("int8", "bf16")
ROWS_PER_SHARD = 1024
UNCALIBRATED = 1 << 30
"""Position of views outside the calibration."""


@dataclass
class CacheReport:
    """Results of the command."""

    speeds: list[ViewRate]
    in_memory: float | None
    """Largest fraction of a shard still in memory before a read from storage."""
    steps: list[training.StepResult]
    of_synthetic: dict[str, Spread]
    """Steps per second, relative to a synthetic teacher in the same window."""
    rounding: list[rounding.Rounding]
    views: int
    """Number of views behind ``rounding``."""


def compare_cache(
    path: str,
    overrides: Sequence[str],
    rows: int,
    rounds: int,
    protocol: Protocol,
    world: World,
    device: torch.device,
) -> CacheReport:
    """Build a cache per codec in a temporary folder, and measure it; the process group is open.

    The caches hold ``views.views_per_image`` or one view per image; a round reads ``rows`` of them.
    The protocol is that of the training steps.

    Raises:
        ConfigError: several processes, numbers below 1, or a run without teacher features.
    """
    if world.world_size > 1:
        raise ConfigError("the cache is measured by one process; start it without torchrun")
    if min(rows, rounds, protocol.windows, protocol.steps) < 1:
        raise ConfigError("--rows, --rounds, --windows and --steps must be at least 1")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        config = online_config(path, overrides, folder)
        index = open_images(config.data, folder / "index", recheck_excluded=True)
        teacher = assemble_teacher(config, needs(config), load=True).to(
            device, compute_dtype(config)
        )
        builder = Builder(config, index, teacher, device)
        stack.callback(builder.close)
        caches: list[BuiltCache] = []
        calibration = None
        for codec in CODECS:
            caches.append(build_cache(builder, folder / codec, codec))
            stack.callback(caches[-1].teacher.close)
            calibration = calibration or builder.calibration
        if calibration is None:
            raise RuntimeError("int8 was not calibrated; please report this")
        speeds, in_memory = cache_speed.measure_views(builder, caches, rows, rounds)
        results, ratios = measure_steps(config, caches, teacher, protocol, world, device)
        rounded = measure_rounding(config, index, teacher, calibration, rows, device)
        return CacheReport(speeds, in_memory, results, ratios, rounded, rows)


def online_config(path: str, overrides: Sequence[str], folder: Path) -> Config:
    """Return the recipe with the online teacher, fixed views and one micro-batch per step.

    Raises:
        ConfigError: if the loss does not use the teacher's features.
    """
    own = ["teacher.mode=online", f"cache.dir={folder}", f"data.index={folder / 'index'}"]
    config = load_config(path, [*overrides, *own])
    if config.teachers:
        raise ConfigError(
            f"{path}: the cache of a single teacher is measured, and the recipe has several; set "
            "teachers=[] and teacher.model"
        )
    if not needs(config).teacher_features:
        raise ConfigError(f"{path}: the loss does not use the teacher's features")
    config.views.views_per_image = config.views.views_per_image or 1
    config.train.global_batch_size = config.train.micro_batch_size
    config.cache.spot_check = 0.0
    return config


def cached_config(config: Config, folder: Path, codec: Codec) -> Config:
    """Return the run with a cache and without a teacher."""
    return replace(
        config,
        teacher=replace(config.teacher, mode="cached"),
        cache=replace(config.cache, dir=str(folder), codec=codec, on_miss="stop"),
    )


def build_cache(builder: Builder, folder: Path, codec: Codec) -> BuiltCache:
    """Build a cache and open it."""

    def fail(error: Exception) -> NoReturn:
        raise error

    manifest = builder.begin_cache(folder, codec, ROWS_PER_SHARD)
    size = manifest.num_rows * manifest.row_bytes() / 1e9
    logger.info("building %d views, %s, %.2f GB in %s", manifest.num_rows, codec, size, folder)
    build_shards(builder, folder, manifest, range(manifest.num_shards))
    config = cached_config(builder.config, folder, codec)
    skeleton, device = builder.teacher, builder.device
    teacher = CachedTeacher(config, manifest, builder.calibration, skeleton, None, device, fail)
    return BuiltCache(codec, folder, manifest, teacher)


def measure_steps(
    config: Config,
    caches: Sequence[BuiltCache],
    teacher: OnlineTeacher,
    protocol: Protocol,
    world: World,
    device: torch.device,
) -> tuple[list[training.StepResult], dict[str, Spread]]:
    """Time the training step with a synthetic teacher, each cache and the online teacher."""
    configs = [cached_config(config, one.folder, one.codec) for one in caches]
    count = batch_plan(config, world.world_size).micro_batch_size
    synthetic = SyntheticTeacher(teacher, count, device)
    variants = [Variant("synthetic teacher", configs[0], "auto", {"": synthetic})]
    for own, cache in zip(configs, caches, strict=True):
        variants.append(Variant(f"cache, {cache.codec}", own, "auto", before=cache.drop))
    variants.append(Variant("online teacher", config, "auto"))
    results = training.measure_variants(variants, protocol, True, world, device)
    first = results[0].windows_s
    ratios = {
        one.label: Spread.of([a / b for a, b in zip(first, one.windows_s, strict=True)])
        for one in results[1:]
        if first and one.windows_s
    }
    return results, ratios


def measure_rounding(
    config: Config,
    index: Index,
    teacher: OnlineTeacher,
    calibration: Calibration,
    views: int,
    device: torch.device,
) -> list[rounding.Rounding]:
    """Measure the effect of rounding on gradients, on views outside the calibration."""
    with Stream(
        index,
        seed=config.run.seed,
        micro_batch=config.train.micro_batch_size,
        sizes=view_sizes(config.views.image_size, {"": teacher}),
        scale=config.views.crop_scale,
        ratio=config.views.aspect_ratio,
        flip=config.views.hflip,
        threads=config.data.workers,
        start_position=UNCALIBRATED,
        decode=config.data.decode,
        device=device,
    ) as stream:
        batches = islice(stream, -(-views // config.train.micro_batch_size))
        return rounding.measure_codecs(config, batches, teacher, calibration, device)


def render_cache_report(report: CacheReport, on_gpu: bool) -> str:
    """Return Markdown tables."""
    unit = "s" if on_gpu else "CPU-s"
    header = [f"steps/{unit}", "relative to a synthetic teacher, by window"]
    ratios = [[name, str(ratio)] for name, ratio in report.of_synthetic.items()]
    return "\n\n".join(
        [
            cache_speed.views_table(report.speeds, report.in_memory),
            training_tables(report.steps, on_gpu),
            markdown_table(header, ratios),
            rounding.rounding_table(report.rounding, report.views),
        ]
    )
