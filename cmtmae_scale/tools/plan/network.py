"""Collectives of a step and their modelled seconds; bytes by ``backends/traffic.py``."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from cmtmae_scale.backends.traffic import Traffic, fsdp_traffic, zero_traffic
from cmtmae_scale.config.schema import Config
from cmtmae_scale.tools.estimate import MetaNetworks

Group = tuple[str, int]
"""Kind of a collective and ranks of its group."""
PER_MICRO_STEP = {1: set[str](), 2: {"all-reduce"}, 3: {"all-gather", "reduce-scatter"}}
"""ZeRO's stage -> kinds that every micro-step issues for weights and gradients."""


@dataclass(frozen=True)
class Exchange:
    """Collectives of one kind over groups of one size, per step, from one rank's side."""

    kind: str
    ranks: int
    """Of the group."""
    calls: int
    payload_bytes: int
    """Bytes of the whole tensors: gathered, to be scattered, or to be reduced."""
    sent_bytes: float
    """Bytes that a rank sends in a ring."""
    path: str
    """``node``, or ``network`` if the group spans nodes."""
    seconds: float
    """Modelled: bytes by rate, plus the hops of the rings."""


def step_traffic(
    config: Config, networks: MetaNetworks, world_size: int, node_size: int, accumulation: int
) -> list[Traffic]:
    """Return the collectives of a step of ``accumulation`` micro-steps.

    Args:
        config: checked settings.
        networks: only shapes are read.
        world_size: number of ranks.
        node_size: ranks per node.
        accumulation: micro-steps per step.

    Raises:
        ConfigError: nodes of ``backend.sharding=hybrid`` with unequally many ranks.
    """
    if world_size == 1:
        return []
    if networks.momentum is not None:
        networks.momentum.requires_grad_(False)

    def count(with_momentum: bool) -> tuple[Counter[Group], Counter[Group]]:
        momentum = networks.momentum if with_momentum else None
        if config.backend.name == "deepspeed":
            return sum_groups(zero_traffic(config, networks.model, momentum, world_size))
        return sum_groups(fsdp_traffic(config, networks.model, momentum, world_size, node_size))

    is_fsdp = config.backend.name == "fsdp"
    repeated = {"all-gather"} if is_fsdp else PER_MICRO_STEP[config.backend.zero_stage]
    if config.backend.reduce_every_micro_step:
        repeated = repeated | {"reduce-scatter"}
    shards_all = config.backend.sharding == "full" if is_fsdp else config.backend.zero_stage == 3
    ema_times = accumulation if shards_all else 1
    (calls, payloads), (all_calls, all_payloads) = count(False), count(True)
    found: list[Traffic] = []
    for group in sorted(all_calls):
        times = accumulation if group[0] in repeated else 1
        number = times * calls[group] + ema_times * (all_calls[group] - calls[group])
        size = times * payloads[group] + ema_times * (all_payloads[group] - payloads[group])
        found.append(Traffic(*group, number, size))
    return found


def sum_groups(traffic: Iterable[Traffic]) -> tuple[Counter[Group], Counter[Group]]:
    """Return calls and payloads by kind and size of the group."""
    calls: Counter[Group] = Counter()
    payloads: Counter[Group] = Counter()
    for one in traffic:
        calls[one.kind, one.ranks] += one.calls
        payloads[one.kind, one.ranks] += one.payload
    return calls, payloads


def time_exchanges(
    config: Config,
    traffic: Iterable[Traffic],
    world_size: int,
    node_size: int,
    link_bytes_s: float,
    network_bytes_s: float,
) -> list[Exchange]:
    """Return collectives with their modelled seconds.

    A group within a node is as fast as the links of the node. A ring over several nodes crosses
    from node to node once per network adapter: with m of its ranks on each node it is as fast as m
    adapters together, and no faster than the links.

    Args:
        config: for the sharding.
        traffic: of ``step_traffic``.
        world_size: number of ranks.
        node_size: ranks per node.
        link_bytes_s: bytes per second of a GPU within its node, per direction.
        network_bytes_s: bytes per second of the network, per GPU and direction.
    """
    is_hybrid = config.backend.name == "fsdp" and config.backend.sharding == "hybrid"
    found: list[Exchange] = []
    for one in traffic:
        within = world_size <= node_size or (is_hybrid and one.kind != "all-reduce")
        members = 1 if is_hybrid else node_size
        rate = link_bytes_s if within else min(link_bytes_s, members * network_bytes_s)
        found.append(
            Exchange(
                one.kind,
                one.ranks,
                one.calls,
                one.payload,
                one.sent_bytes,
                "node" if within else "network",
                one.sent_bytes / rate + one.latency_s,
            )
        )
    return found
