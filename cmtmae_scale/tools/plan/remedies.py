"""Remedies for a run that needs more memory than the device has."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from cmtmae_scale.config.batch import split_batch
from cmtmae_scale.config.schema import Config
from cmtmae_scale.tools.estimate import saved_bytes, state_bytes
from cmtmae_scale.tools.plan.devices import KNOWN
from cmtmae_scale.tools.plan.plan import Cluster, Counted, Scale

GIB = 2**30


def refuse_memory(config: Config, counted: Counted, cluster: Cluster, chosen: Scale) -> str | None:
    """Return why a run does not fit the device, and what to change; ``None``: it fits."""
    usable = cluster.device.usable_bytes
    if chosen.memory_bytes <= usable:
        return None
    remedies = list(dict.fromkeys(find_remedies(config, counted, cluster, chosen)))
    remedies += [
        f"--device {device.name}"
        for device in sorted(KNOWN, key=lambda one: one.memory_bytes)
        if device.usable_bytes >= chosen.memory_bytes
    ][:1]
    if not remedies:
        remedies = ["a smaller student.arch"]
    return (
        f"{chosen.memory_bytes / GIB:.1f} GiB per GPU (modelled), but {cluster.device.name} has "
        f"{usable / GIB:.1f} GiB for a run; use {' or '.join(remedies)}"
    )


def find_remedies(
    config: Config, counted: Counted, cluster: Cluster, chosen: Scale
) -> Iterator[str]:
    """Yield overrides with which the run fits the device."""
    usable, node_size = cluster.device.usable_bytes, min(cluster.node_size, chosen.gpus)
    saved_view = {config.backend.activation_checkpointing: counted.saved_view}
    teachers, views = counted.networks.teachers, chosen.batch.micro_batch_size

    def fit_views(changed: Config) -> int:
        """Return the largest micro-batch, up to the present one, that fits; 0: none does."""
        key = changed.backend.activation_checkpointing
        if key not in saved_view:
            saved_view[key] = saved_bytes(changed, teachers)
        size = views
        while True:  # a smaller micro-batch may need more states: gradients that are added up
            sized = replace(changed, train=replace(changed.train, micro_batch_size=size))
            held = state_bytes(sized, chosen.gpus, counted.networks, node_size)
            most = int((usable - sum(held.values())) // (saved_view[key] + counted.input_view))
            if most >= size:
                return size
            if most < 1:
                return 0
            total = config.train.global_batch_size
            size = split_batch(total, most, chosen.gpus).micro_batch_size

    micro = fit_views(config)
    if micro:
        yield f"train.micro_batch_size={micro}"
    singles = list(list_changes(config, chosen.gpus, node_size))
    pairs = [one | two for n, one in enumerate(singles) for two in singles[n + 1 :]]
    is_found = micro > 0
    for changes in singles:
        if fit_views(change_backend(config, changes)) == views:
            is_found = True
            yield name_changes(changes)
    for changes in () if is_found else (*singles, *pairs):
        micro = fit_views(change_backend(config, changes))
        if micro:
            yield f"{name_changes(changes)} train.micro_batch_size={micro}"


def list_changes(config: Config, gpus: int, node_size: int) -> Iterator[dict[str, Any]]:
    """Yield changes of the backend that save memory, by key."""
    backend = config.backend
    if not backend.activation_checkpointing:
        yield {"activation_checkpointing": True}
    if gpus > 1 and backend.name == "fsdp" and backend.sharding != "full":
        if backend.sharding == "replicate" and gpus % node_size == 0:
            yield {"sharding": "hybrid"}
        yield {"sharding": "full"}
    waits = not backend.reduce_every_micro_step  # between micro-steps, also if it needs several
    if gpus > 1 and backend.name == "fsdp" and backend.sharding != "replicate" and waits:
        yield {"reduce_every_micro_step": True}
    if gpus > 1 and backend.name == "deepspeed":
        if backend.zero_stage < 2:
            yield {"zero_stage": 2}
        if backend.zero_stage < 3:
            yield {"zero_stage": 3, "compile": False}


def change_backend(config: Config, changes: dict[str, Any]) -> Config:
    """Return a config with other settings of the backend."""
    return replace(config, backend=replace(config.backend, **changes))


def name_changes(changes: dict[str, Any]) -> str:
    """Return changes as overrides."""
    return " ".join(f"backend.{key}={str(value).lower()}" for key, value in changes.items())
