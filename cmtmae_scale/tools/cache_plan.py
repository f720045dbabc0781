"""Cost plan of a teacher cache: what it costs and saves, from measured rates.

Model. With an online teacher, a GPU trains and forwards the teacher in turn, so that the seconds
per view add up. All GPUs build the cache, each at the slower of its teacher and its decoding,
together no faster than the store writes. A GPU that reads the cache trains at the slower of its own
rate and the store's.
"""

import logging
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from cmtmae_scale.cache.build import row_shape
from cmtmae_scale.cache.codecs import Codec
from cmtmae_scale.cache.format import Manifest
from cmtmae_scale.config.batch import total_steps
from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.teachers.build import assemble_teacher, compute_dtype
from cmtmae_scale.teachers.online import OnlineTeacher
from cmtmae_scale.tools.cache_rates import MEASURE_S, Measured, measure_rates
from cmtmae_scale.tools.estimate import build_meta_networks, count_flops
from dataloading.index import Index
from dataloading.passed_over import format_count

logger = logging.getLogger(__name__)

HOUR_S = 3600.0
MONTH_H = 730.0
MAX_RUNS = 1000
"""More runs on the same views are not worth planning."""
VIEWS_PER_IMAGE = (1, 4, 16)
NODE_GPUS = 8
COLUMNS = 100
DROPPED = 0.01
"""Fraction of pages in memory below which the plan does not mention them."""


@dataclass(frozen=True)
class Job:
    """A run that may read a cache."""

    images: int
    """Images of the data set."""
    draws: int
    """Views of the whole run."""
    gpus: int
    """GPUs that build, and that train."""
    spot_check: float = 0.0
    """Fraction of views that the teacher forwards although a cache is read."""


@dataclass(frozen=True)
class Rates:
    """Rates of a GPU and of the store, all above 0."""

    teacher: float
    """Images per second of the teacher's forward on one GPU."""
    train: float
    """Images per second that one GPU trains on without a teacher."""
    decode: float
    """Views per second that one process decodes; infinite if unknown."""
    write: float
    """Bytes per second that the store takes from all processes."""
    read: float
    """Bytes per second that the store gives one process."""


class Origins(NamedTuple):
    """Origin of the numbers of a plan, in words."""

    device: str
    dtype: str
    """Compute dtype of the teacher."""
    images: str
    train: str


@dataclass(frozen=True)
class Prices:
    """Prices in any one currency."""

    gpu_hour: float
    tb_month: float
    """Of 10^12 bytes for a month of 730 hours."""


class Outlook(NamedTuple):
    """Cost and benefit of one codec and one number of views per image."""

    codec: Codec
    views: int
    disk_bytes: int
    read_gpu: float
    """Bytes per second that a GPU needs to train at its own rate."""
    build_h: float
    run_h: float
    """Hours of a run that reads the cache."""
    online_h: float
    """Hours of a run with an online teacher."""
    starved: bool
    """Whether the store is slower than the GPU."""
    repeats: bool
    """Whether a run sees any view twice; if not, building takes as many teacher forwards."""
    from_run: int | None
    """Number of equal runs from which building and reading take less time than online teachers."""
    saved: float | None
    """Money that one run saves, with storage paid from the start of building to the run's end."""

    @property
    def verdict(self) -> str:
        """Whether the cache saves time, in a few words."""
        if self.from_run is None:
            return "never (reading)"
        if self.from_run == 1:
            return f"yes, {1 - (self.build_h + self.run_h) / self.online_h:.0%} less"
        if self.from_run > MAX_RUNS:
            return f"not in {MAX_RUNS:,} runs"
        return f"{'no' if self.repeats else 'no#'}; from run {self.from_run}"


def weigh_cache(
    job: Job, rates: Rates, codec: Codec, count: int, row_bytes: int, prices: Prices | None
) -> Outlook:
    """Weigh a cache, ``count`` views of ``row_bytes`` per image, against the online teacher."""
    rows = job.images * count
    online_h = job.draws * (1 / rates.train + 1 / rates.teacher) / job.gpus / HOUR_S
    computed = 1 / rates.train + job.spot_check / rates.teacher
    run_h = job.draws * max(computed, row_bytes / rates.read) / job.gpus / HOUR_S
    each = min(rates.teacher, rates.decode)
    build_h = rows / min(job.gpus * each, rates.write / row_bytes) / HOUR_S
    repeats = rows < job.draws
    from_run = None
    if run_h < online_h:
        # Without repetition one run never pays, whatever the rounding of these floats.
        from_run = max(math.floor(build_h / (online_h - run_h)) + 1, 1 if repeats else 2)
    saved = None
    if prices is not None:
        cached_h = build_h + run_h
        storage = rows * row_bytes / 1e12 * prices.tb_month * cached_h / MONTH_H
        saved = (online_h - cached_h) * job.gpus * prices.gpu_hour - storage
    return Outlook(
        codec,
        count,
        rows * row_bytes,
        row_bytes * rates.train,
        build_h,
        run_h,
        online_h,
        row_bytes / rates.read > computed,
        repeats,
        from_run,
        saved,
    )


def cost_plan(
    config: Config,
    index: Index | None,
    device: torch.device,
    gpus: int,
    images_s: float | None,
    prices: Prices | None,
) -> str:
    """Measure this machine, and return the plan as text.

    Args:
        config: the run.
        index: the images; ``None``: ``data.expected_images`` replaces their count.
        device: where the teacher computes.
        gpus: GPUs that build and train.
        images_s: images per second that a GPU trains on without a teacher, if given.
        prices: of GPUs and storage, if known.

    Raises:
        ConfigError: a run that uses no teacher.
        CacheError: a store that refuses.
    """
    codecs = usable_codecs(config)
    teacher = assemble_teacher(config, needs(config), load=False).to(device, compute_dtype(config))
    images = len(index) if index is not None else int(config.data.expected_images or 0)
    manifests: dict[Codec, Manifest] = {codec: plan_manifest(teacher, codec) for codec in codecs}
    chosen = config.cache.codec if config.cache.codec in manifests else codecs[0]
    logger.info("measuring for about %.0f s", 4 * MEASURE_S)
    measured = measure_rates(config, teacher, index, manifests[chosen], device)
    on_gpu = device.type == "cuda"
    rates = choose_rates(measured, flops_ratio(config), images_s, on_gpu)
    draws = total_steps(config, images) * config.train.global_batch_size
    job = Job(images, draws, gpus, config.cache.spot_check)
    outlooks = [
        weigh_cache(job, rates, codec, count, manifest.row_bytes(), prices)
        for codec, manifest in manifests.items()
        for count in sorted({*VIEWS_PER_IMAGE, config.views.views_per_image or 1})
    ]
    origins = Origins(
        torch.cuda.get_device_name(device) if on_gpu else "CPU",
        str(teacher.dtype).removeprefix("torch."),
        "data.expected_images, not counted" if index is None else f"counted in {config.data.path}",
        "modelled from FLOPs; see --images-s" if images_s is None else "given",
    )
    return "\n".join(
        [
            f"{config.run.name}: a cache of its teacher, or the online teacher",
            "",
            *fact_lines(config, job, rates, measured, origins),
            f"  online run  {format_hours(outlooks[0].online_h)} h",
            "",
            outlook_table(outlooks, min(gpus, NODE_GPUS)),
            "",
            *explanations(config, prices, images_s is None and not on_gpu),
        ]
    )


def usable_codecs(config: Config) -> list[Codec]:
    """Return the codecs that store what the run needs.

    Raises:
        ConfigError: if the run uses no teacher.
    """
    needed = needs(config)
    if not needed.teacher:
        raise ConfigError(
            "--plan: neither the mask nor the loss uses the teacher; there is nothing to cache"
        )
    return ["int8", "bf16"] if needed.teacher_features else ["attention"]


def plan_manifest(teacher: OnlineTeacher, codec: Codec) -> Manifest:
    """Return a manifest with the rows of the cache, and more of them than are measured."""
    patches, tokens, width = row_shape(teacher)
    return Manifest({}, {}, codec, 2**20, 1024, patches, tokens, width, None)


def flops_ratio(config: Config) -> float:
    """Return FLOPs of the teacher's forward of a view, divided by those of training on it."""
    online = replace(config, teacher=replace(config.teacher, mode="online"))
    work = count_flops(online, build_meta_networks(online))
    return work.teacher / (work.student + work.momentum)


def choose_rates(found: Measured, ratio: float, given: float | None, on_gpu: bool) -> Rates:
    """Return the rates of a GPU: measured on a GPU, else modelled from FLOPs.

    ``given`` is the rate in images per second at which a GPU trains without a teacher. If the
    teacher was not measured on a GPU, this rate belongs to another device, and the teacher's rate
    follows from it and ``ratio``.
    """
    teacher = found.teacher if on_gpu or given is None else given / ratio
    decode = math.inf if found.decode is None else found.decode
    train = given or teacher * ratio
    return Rates(teacher, train, decode, found.write, found.read)


def outlook_table(outlooks: list[Outlook], node: int) -> str:
    """Align at least one outlook as text of at most 100 columns; ``node`` is GPUs per node."""
    header = ["codec", "views", "disk", "per GPU", f"node of {node}", "build h", "run h"]
    lines = [[*header, *(["saved"] if outlooks[0].saved is not None else []), "pays in time"]]
    for one in outlooks:
        line = [one.codec, str(one.views), format_bytes(one.disk_bytes)]
        line += [f"{format_bytes(rate)}/s" for rate in (one.read_gpu, node * one.read_gpu)]
        line += [format_hours(one.build_h), format_hours(one.run_h) + ("*" if one.starved else " ")]
        if one.saved is not None:
            line.append(f"{one.saved:+,.0f}" if abs(one.saved) < 1e7 else f"{one.saved:+.3g}")
        lines.append([*line, one.verdict])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text: list[str] = []
    for line in lines:
        padded = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        padded[0], padded[-1] = line[0].ljust(widths[0]), line[-1]
        text.append("  ".join(padded))
    return "\n".join(text)


def format_bytes(count: float) -> str:
    """Format bytes with three digits and a unit of powers of ten."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} PB" if count < 999.5 else f"{count:,.0f} PB"


def format_rate(value: float) -> str:
    """Format images per second: whole numbers from a hundred on, else three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_hours(value: float) -> str:
    """Format hours with three digits, or as whole numbers."""
    return f"{value:,.0f}" if 100 <= value < 1e6 else f"{value:.3g}"


def fact_lines(
    config: Config, job: Job, rates: Rates, found: Measured, how: Origins
) -> Iterator[str]:
    """Yield the measured, counted, given and modelled numbers."""
    yield f"measured here, by one process ({how.device})"
    yield f"  teacher     {format_rate(found.teacher)} images/s: {how.dtype}, batch {found.batch}"
    if found.decode is None:
        yield "  decoding    not measured, assumed to be fast enough: data.path is absent"
    else:
        yield f"  decoding    {format_rate(found.decode)} views/s: {config.data.workers} threads"
    yield f"  writing     {format_bytes(found.write)}/s: whole shards, checksums and fsync included"
    source = "from storage"
    if found.in_memory is None:
        source = "perhaps from memory: this file system does not report it"
    elif found.in_memory > DROPPED:
        source = f"{found.in_memory:.0%} from memory: it could not be dropped"
    yield f"  reading     {format_bytes(found.read)}/s: random rows, checksums included; {source}"
    yield "counted, given or modelled"
    yield f"  images      {job.images:,}: {how.images}"
    gpus = format_count(job.gpus, "GPU")
    yield f"  run         {job.draws:,} views, {job.draws / job.images:,.4g} epochs, on {gpus}"
    yield f"  training    {format_rate(rates.train)} images/s per GPU without teacher, {how.train}"
    if rates.teacher != found.teacher:
        yield f"  teacher     {format_rate(rates.teacher)} images/s per GPU, modelled from FLOPs"


def explanations(config: Config, prices: Prices | None, of_cpu: bool) -> Iterator[str]:
    """Yield lines that explain the table."""
    yield from textwrap.wrap(
        "Per GPU, node: bytes that training reads. Hours are modelled: each GPU builds at the "
        "slower of teacher and decoding, all together no faster than one process wrote here; an "
        "online teacher and training take turns; reading overlaps with training, and every GPU "
        "reads at the rate above. *: reading is slower than the GPU.",
        COLUMNS,
    )
    yield from textwrap.wrap(
        "From run N: building once pays from the N-th run on the same views. #: never in one run, "
        "because it has no more epochs than views and sees no view twice: building takes at least "
        "as many teacher forwards as the run.",
        COLUMNS,
    )
    if prices is not None:
        yield "Saved: by one run, with storage paid from the start of building to the run's end."
    if config.cache.spot_check:
        yield f"cache.spot_check={config.cache.spot_check:g} is counted."
    if of_cpu:
        yield "These are hours of this CPU; for GPUs run this on one, or give --images-s."
