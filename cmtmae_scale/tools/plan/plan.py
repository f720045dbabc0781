"""The plan of a run: memory, time, cost and traffic on a number of GPUs, as one dataclass.

Counted: parameters, saved activations, FLOPs and bytes of every kernel, collectives and their
bytes. Modelled: every time, from a fraction of the rates of a data sheet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cmtmae_scale.backends.fsdp import ranks_per_shard_group
from cmtmae_scale.config.batch import BatchPlan, batch_plan, total_steps
from cmtmae_scale.config.schema import Config
from cmtmae_scale.tools.cache_plan import (
    VIEWS_PER_IMAGE,
    Job,
    Outlook,
    Rates,
    plan_manifest,
    usable_codecs,
    weigh_cache,
)
from cmtmae_scale.tools.estimate import (
    MetaNetworks,
    build_meta_networks,
    count_shards,
    input_bytes,
    list_teachers,
    saved_bytes,
    state_bytes,
)
from cmtmae_scale.tools.plan.devices import Device
from cmtmae_scale.tools.plan.kernels import (
    Kernel,
    StepKernels,
    StepTime,
    count_kernels,
    device_seconds,
    flops_per_view,
    online_fractions,
)
from cmtmae_scale.tools.plan.network import Exchange, step_traffic, time_exchanges
from dataloading.passed_over import format_count

DAY_S = 86400.0
LAUNCH_S = 4e-6
"""Host seconds per kernel; assumed, as by ``benchmark model``."""
DECODE_VIEWS_S = 465.0
"""Views of 224 pixels per CPU-second of ``data.decode=torch``; measured, docs/performance.md."""
LAUNCHES, COLLECTIVES = "launches", "collectives"


@dataclass(frozen=True)
class Cluster:
    """GPUs and their assumed rates."""

    gpus: int
    node_size: int
    """GPUs per node."""
    device: Device
    fraction: float
    """Fraction of the data sheet's FLOP/s and memory bandwidth that kernels reach."""
    fraction_origin: str
    link_fraction: float
    """Fraction of the bandwidth of links and network that collectives reach."""
    network_bytes_s: float
    """Bytes per second of the network per GPU and direction, at best."""
    price: float | None
    """Of a GPU-hour, in any currency."""


@dataclass(frozen=True)
class Images:
    """Images of a run."""

    count: int | None
    """``None``: unknown, which only a run with ``train.steps`` may leave open."""
    origin: str
    bytes_each: float
    bytes_origin: str


class Counted(NamedTuple):
    """Quantities that are counted once for all numbers of GPUs."""

    networks: MetaNetworks
    kernels: StepKernels
    saved_view: float
    """Bytes of activations per view."""
    input_view: float
    """Bytes of images per view before they are normalised."""


@dataclass(frozen=True)
class Scale:
    """A run on a number of GPUs; all times are modelled."""

    gpus: int
    batch: BatchPlan
    memory: dict[str, float]
    """Bytes per GPU by part."""
    device_s: float
    """Kernels of a step."""
    host_s: float
    """Launches of a step."""
    exchanges: list[Exchange]
    steps: int

    @property
    def memory_bytes(self) -> float:
        """Bytes per GPU at the peak."""
        return sum(self.memory.values())

    @property
    def communication_s(self) -> float:
        """Seconds of the collectives of a step."""
        return sum(one.seconds for one in self.exchanges)

    @property
    def step_s(self) -> float:
        """Seconds of a step; collectives overlap with nothing."""
        return max(self.device_s, self.host_s) + self.communication_s

    @property
    def images_s(self) -> float:
        """Views per second of all GPUs."""
        return self.batch.global_batch_size / self.step_s

    @property
    def days(self) -> float:
        """Days of all steps."""
        return self.steps * self.step_s / DAY_S

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of all steps."""
        return 24 * self.days * self.gpus

    @property
    def limit(self) -> str | None:
        """Part that takes longer than the kernels, if any; more GPUs then gain little."""
        if max(self.host_s, self.communication_s) <= self.device_s:
            return None
        return LAUNCHES if self.host_s > self.communication_s else COLLECTIVES


@dataclass(frozen=True)
class NodeData:
    """Rates that reading and decoding must deliver to a node; modelled."""

    views_s: float
    bytes_s: float
    cores: float
    """Cores that decode."""


@dataclass(frozen=True)
class Plan:
    """A plan; see ``make_plan``."""

    name: str
    cluster: Cluster
    images: Images
    chosen: Scale
    scales: list[Scale]
    """By number of GPUs."""
    stop: str
    """Where the global batch stops scaling, and why."""
    flops_fraction: float
    """FLOPs of a step, divided by those of the data sheet in the same time."""
    data: NodeData
    caches: dict[str, list[Outlook]]
    """By the teacher's name; empty without a teacher, or without the number of images."""


def check_split(config: Config, gpus: int, node_size: int) -> None:
    """Refuse a number of GPUs that cannot share the batch or the weights, before any other work.

    Raises:
        ConfigError: names settings that work.
    """
    batch_plan(config, gpus)
    if config.backend.name == "fsdp":
        ranks_per_shard_group(config.backend.sharding, gpus, min(node_size, gpus))


def count_work(config: Config) -> Counted:
    """Count the work of a run; takes seconds.

    Raises:
        ConfigError: networks that cannot be built.
    """
    networks = build_meta_networks(config)
    return Counted(
        networks,
        count_kernels(config),
        saved_bytes(config, networks.teachers),
        input_bytes(config, networks.teachers),
    )


def make_plan(config: Config, counted: Counted, cluster: Cluster, images: Images) -> Plan:
    """Plan a run on a cluster.

    Args:
        config: checked settings that ``check_split`` accepts.
        counted: of the config.
        cluster: GPUs, and the rates that are assumed.
        images: their number and size.
    """
    chosen = plan_scale(config, counted, cluster, images, cluster.gpus)
    scales = [
        chosen if gpus == cluster.gpus else plan_scale(config, counted, cluster, images, gpus)
        for gpus in list_gpus(config, cluster)
    ]
    flops = flops_per_view(counted.kernels, online_fractions(config)) * chosen.images_s
    return Plan(
        config.run.name,
        cluster,
        images,
        chosen,
        scales,
        explain_stop(config, scales),
        flops / cluster.gpus / peak_flops_s(config, cluster.device),
        feed_node(chosen, cluster, images),
        weigh_caches(config, counted, cluster, images, chosen),
    )


def list_gpus(config: Config, cluster: Cluster) -> list[int]:
    """Return the numbers of GPUs of the table: 1, nodes by powers of two, and the chosen number.

    A number by which the global batch or a node cannot be divided is not listed.
    """
    total, found = config.train.global_batch_size, {1, cluster.gpus}
    gpus = cluster.node_size
    while gpus <= total:
        found.add(gpus)
        gpus *= 2
    return sorted(one for one in found if total % one == 0)


def peak_flops_s(config: Config, device: Device) -> float:
    """Return the data sheet's FLOP/s in the compute dtype of a config."""
    return device.bf16_flops_s if config.backend.precision == "bf16" else device.fp32_flops_s


def plan_scale(
    config: Config, counted: Counted, cluster: Cluster, images: Images, gpus: int
) -> Scale:
    """Plan the run on a number of GPUs that share the batch."""
    node_size = min(cluster.node_size, gpus)
    batch = batch_plan(config, gpus)
    memory = state_bytes(config, gpus, counted.networks, node_size)
    memory["input images"] = counted.input_view * batch.micro_batch_size
    memory["activations"] = counted.saved_view * batch.micro_batch_size
    shards = count_shards(config, gpus, node_size).states
    time = time_step(config, counted.kernels, cluster, batch, shards, online_fractions(config))
    traffic = step_traffic(config, counted.networks, gpus, node_size, batch.accumulation)
    link = cluster.link_fraction * cluster.device.link_bytes_s
    network = cluster.link_fraction * cluster.network_bytes_s
    exchanges = time_exchanges(config, traffic, gpus, node_size, link, network)
    steps = total_steps(config, images.count or 1)
    return Scale(gpus, batch, memory, time.device_s, time.host_s, exchanges, steps)


def time_step(
    config: Config,
    kernels: StepKernels,
    cluster: Cluster,
    batch: BatchPlan,
    shards: int,
    online: Mapping[str, float],
) -> StepTime:
    """Model a step without communication.

    Args:
        config: for the compute dtype.
        kernels: of the step.
        cluster: rates.
        batch: split of the batch.
        shards: ranks that share the states; each updates its part.
        online: fraction of micro-steps with the forward of each teacher, by name.
    """
    flops_s = cluster.fraction * peak_flops_s(config, cluster.device)
    bytes_s = cluster.fraction * cluster.device.memory_bytes_s
    views, times = batch.micro_batch_size, batch.accumulation

    def run(group: Sequence[Kernel]) -> float:
        return device_seconds(group, views, flops_s, bytes_s)

    micro_s, micro_launches = run(kernels.micro), float(len(kernels.micro))
    for name, fraction in online.items():
        micro_s += fraction * run(kernels.teachers[name])
        micro_launches += fraction * len(kernels.teachers[name])
    launches = times * micro_launches + len(kernels.update)
    return StepTime(times * micro_s + run(kernels.update) / shards, launches * LAUNCH_S)


def explain_stop(config: Config, scales: list[Scale]) -> str:
    """Return where the global batch stops scaling, and why."""
    total = config.train.global_batch_size
    for one in scales:
        if one.limit is None:
            continue
        slow_s = one.host_s if one.limit == LAUNCHES else one.communication_s
        views = total // one.gpus
        return (
            f"train.global_batch_size={total} stops scaling at {format_count(one.gpus, 'GPU')}: "
            f"with {format_count(views, 'view')} per GPU and step, {one.limit} take "
            f"{1e3 * slow_s:.1f} ms, kernels {1e3 * one.device_s:.1f} ms"
        )
    return (
        f"train.global_batch_size={total} scales to {format_count(scales[-1].gpus, 'GPU')}; above "
        f"{format_count(total, 'GPU')} there are fewer views than ranks"
    )


def feed_node(scale: Scale, cluster: Cluster, images: Images) -> NodeData:
    """Return the rates at which a node must read and decode."""
    views_s = scale.images_s / scale.gpus * min(cluster.node_size, scale.gpus)
    return NodeData(views_s, views_s * images.bytes_each, views_s / DECODE_VIEWS_S)


def weigh_caches(
    config: Config, counted: Counted, cluster: Cluster, images: Images, chosen: Scale
) -> dict[str, list[Outlook]]:
    """Weigh caches of each teacher against the online teacher; other teachers are not changed.

    Decoding uses the workers of the recipe; the store is as fast as required.
    """
    if images.count is None:
        return {}
    views = chosen.batch.micro_batch_size
    shards = count_shards(config, chosen.gpus, min(cluster.node_size, chosen.gpus)).states
    share = views * chosen.batch.accumulation
    draws = chosen.steps * config.train.global_batch_size
    job = Job(images.count, draws, chosen.gpus, config.cache.spot_check)
    found: dict[str, list[Outlook]] = {}
    for name, alone, teacher in list_teachers(config, counted.networks.teachers):
        times = [
            time_step(
                config,
                counted.kernels,
                cluster,
                chosen.batch,
                shards,
                online_fractions(config) | {name: online},
            ).seconds
            + chosen.communication_s
            for online in (0.0, 1.0)
        ]
        rates = Rates(
            teacher=share / (times[1] - times[0]),
            train=share / times[0],
            decode=DECODE_VIEWS_S * config.data.workers,
            write=float("inf"),
            read=float("inf"),
        )
        found[name] = [
            weigh_cache(job, rates, codec, count, plan_manifest(teacher, codec).row_bytes(), None)
            for codec in usable_codecs(alone)
            for count in sorted({*VIEWS_PER_IMAGE, config.views.views_per_image or 1})
        ]
    return found
