"""A teacher's cache against the live teacher: reading, decoding and the step, taking turns."""

import logging
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch

from cmtmae_scale.cache.build import Builder, build_shards
from cmtmae_scale.cache.codecs import Calibration, Codec
from cmtmae_scale.cache.teacher import CachedTeacher
from cmtmae_scale.config.derive import needs
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import CacheError, ConfigError
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.teachers.base import TeacherView, view_sizes
from cmtmae_scale.teachers.build import assemble, compute_dtype
from cmtmae_scale.teachers.online import OnlineTeacher
from cmtmae_scale.tools.benchmark import cache_speed, rounding, training
from cmtmae_scale.tools.benchmark.cache_speed import Cached, Speed
from cmtmae_scale.tools.benchmark.clock import Spread, spread
from cmtmae_scale.tools.benchmark.table import markdown, training_tables
from cmtmae_scale.tools.benchmark.training import Protocol, Variant
from dataloading.index import Index, load_or_build
from dataloading.stream import Batch, Stream

logger = logging.getLogger(__name__)

CODECS: tuple[Codec, ...] = ("int8", "bf16")
ROWS_PER_SHARD = 1024
ELSEWHERE = 1 << 30
"""Position of views whose crops calibrated nothing."""


@dataclass
class Report:
    """What the command tells."""

    speeds: list[Speed]
    in_memory: float | None
    """Largest share of a shard that was still in memory when it was to be read from storage."""
    steps: list[training.Result]
    of_synthetic: dict[str, Spread]
    """Steps a second, divided by those with a synthetic teacher in the same window."""
    rounding: list[rounding.Rounding]
    views: int
    """Views that ``rounding`` is of."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Synthetic:
    """A teacher that always shows the same random view, on the device."""

    image_size = None

    def __init__(self, like: OnlineTeacher, count: int, device: torch.device) -> None:
        self.width, self.has_cls = like.width, like.has_cls
        patches = like.grid[0] * like.grid[1]
        shape = (count, patches + self.has_cls, self.width)
        attention = None
        if like.outputs.attention_layers:
            attention = torch.rand(count, patches, device=device).softmax(-1)
        self.view = TeacherView(attention, torch.randn(shape, device=device), True)

    def forward_batch(self, batch: Batch) -> TeacherView:
        """See ``TeacherSource.look``."""
        return self.view


def measure(
    path: str,
    overrides: Sequence[str],
    rows: int,
    rounds: int,
    protocol: Protocol,
    world: World,
    device: torch.device,
) -> Report:
    """Build a cache by each codec in a temporary folder, and measure; the process group is open.

    Args:
        path: recipe.
        overrides: of the recipe; all views of ``data.path`` are built, ``views.views_per_image`` or one each.
        rows: views a round.
        rounds: rounds of which the median counts.
        protocol: of the training steps.
        world: this process's place: alone.
        device: where teacher and student compute.

    Raises:
        ConfigError: several processes, numbers below 1, or a run that has no use for features.
    """
    if world.world_size > 1:
        raise ConfigError("the cache is measured by one process; start it without torchrun")
    if min(rows, rounds, protocol.windows, protocol.steps) < 1:
        raise ConfigError("--rows, --rounds, --windows and --steps must be at least 1")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        config = live_config(path, overrides, folder)
        index = load_or_build(config.data.path, folder / "index", source=config.data.source)
        teacher = assemble(config, needs(config), load=True).to(device, compute_dtype(config))
        builder = Builder(config, index, teacher, device)
        stack.callback(builder.close)
        caches: list[Cached] = []
        calibration = None
        for codec in CODECS:
            caches.append(build(builder, folder / codec, codec))
            stack.callback(caches[-1].teacher.close)
            calibration = calibration or builder.calibration
        if calibration is None:
            raise RuntimeError("int8 was not calibrated; please report this")
        speeds, in_memory = cache_speed.measure(builder, caches, rows, rounds)
        results, ratios = steps_of(config, caches, teacher, protocol, world, device)
        rounded = rounding_of(config, index, teacher, calibration, rows, device)
        return Report(speeds, in_memory, results, ratios, rounded, rows)


def live_config(path: str, overrides: Sequence[str], folder: Path) -> Config:
    """The recipe with the live teacher, a fixed number of views and one micro-batch a step.

    Raises:
        ConfigError: if its loss does not use the teacher's features.
    """
    own = ["teacher.mode=online", f"cache.dir={folder}", f"data.index={folder / 'index'}"]
    config = load_config(path, [*overrides, *own])
    if not needs(config).teacher_features:
        raise ConfigError(f"{path}: the loss does not use the teacher's features: nothing to read")
    config.views.views_per_image = config.views.views_per_image or 1
    config.train.global_batch_size = config.train.micro_batch_size
    config.cache.spot_check = 0.0
    return config


def cached_config(config: Config, folder: Path, codec: Codec) -> Config:
    """The same run, reading a cache and holding no teacher."""
    return replace(
        config,
        teacher=replace(config.teacher, mode="cached"),
        cache=replace(config.cache, dir=str(folder), codec=codec, on_miss="stop"),
    )


def build(builder: Builder, folder: Path, codec: Codec) -> Cached:
    """Build a cache and open it."""

    def fail(error: CacheError) -> NoReturn:
        raise error

    manifest = builder.begin_cache(folder, codec, ROWS_PER_SHARD)
    size = manifest.num_rows * manifest.row_bytes() / 1e9
    logger.info("building %d views, %s, %.2f GB in %s", manifest.num_rows, codec, size, folder)
    build_shards(builder, folder, manifest, range(manifest.num_shards))
    config = cached_config(builder.config, folder, codec)
    described, device = builder.teacher, builder.device
    teacher = CachedTeacher(config, manifest, builder.calibration, described, None, device, fail)
    return Cached(codec, folder, manifest, teacher)


def steps_of(
    config: Config,
    caches: Sequence[Cached],
    teacher: OnlineTeacher,
    protocol: Protocol,
    world: World,
    device: torch.device,
) -> tuple[list[training.Result], dict[str, Spread]]:
    """The training step with a synthetic teacher, each cache and the live teacher."""
    configs = [cached_config(config, one.folder, one.codec) for one in caches]
    synthetic = Synthetic(teacher, config.train.micro_batch_size, device)
    variants = [Variant("synthetic teacher", configs[0], "auto", synthetic)]
    for own, cache in zip(configs, caches, strict=True):
        variants.append(Variant(f"cache, {cache.codec}", own, "auto", before=cache.drop))
    variants.append(Variant("live teacher", config, "auto"))
    results = training.measure(variants, protocol, True, world, device)
    first = results[0].windows_s
    ratios = {
        one.label: spread([a / b for a, b in zip(first, one.windows_s, strict=True)])
        for one in results[1:]
        if first and one.windows_s
    }
    return results, ratios


def rounding_of(
    config: Config,
    index: Index,
    teacher: OnlineTeacher,
    calibration: Calibration,
    views: int,
    device: torch.device,
) -> list[rounding.Rounding]:
    """What rounding does to gradients, on views that calibrated nothing."""
    with Stream(
        index,
        seed=config.run.seed,
        micro_batch=config.train.micro_batch_size,
        sizes=view_sizes(config.views.image_size, teacher),
        scale=config.views.crop_scale,
        ratio=config.views.aspect_ratio,
        flip=config.views.hflip,
        threads=config.data.workers,
        start_position=ELSEWHERE,
        decode=config.data.decode,
        device=device,
    ) as stream:
        batches = islice(stream, -(-views // config.train.micro_batch_size))
        return rounding.measure(config, batches, teacher, calibration, device)


def describe(report: Report, on_gpu: bool) -> str:
    """Markdown tables."""
    unit = "s" if on_gpu else "CPU-s"
    header = [f"steps/{unit}", "of those with a synthetic teacher, by window"]
    ratios = [[name, str(ratio)] for name, ratio in report.of_synthetic.items()]
    return "\n\n".join(
        [
            cache_speed.describe(report.speeds, report.in_memory),
            training_tables(report.steps, on_gpu),
            markdown(header, ratios),
            rounding.describe(report.rounding, report.views),
        ]
    )
