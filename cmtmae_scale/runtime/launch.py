"""Find this process's rank and device, under any launcher or none."""

import ipaddress
import os
import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cmtmae_scale.errors import ConfigError

COUNT_OPTIONS = {
    "torchrun": "--nproc-per-node",
    "deepspeed": "--num_gpus",
    "srun": "--ntasks-per-node",
}
"""Launcher -> its option for the number of processes per node."""

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NETWORK_NAMESPACE = Path("/proc/self/ns/net")
MOST_NAMED = 8
"""Maximum number of machines that a message names."""


class World(NamedTuple):
    """Rank of this process, and how the ranks connect."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str
    init_method: str = "env://"
    """Rendezvous address, as ``torch.distributed`` takes it."""


def find_world(environment: Mapping[str, str] = os.environ) -> World:
    """Read rank and world size from the environment.

    A launcher's variables have precedence, then those of an srun step, then those of a Kubernetes
    Indexed Job. A pod without WORLD_SIZE and MASTER_ADDR is a run of its own.

    Raises:
        ConfigError: if the variables are incomplete or contradict each other.
    """
    if "RANK" in environment:
        world = read_launcher(environment)
    elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        world = read_srun(environment)
    elif "JOB_COMPLETION_INDEX" in environment and {"WORLD_SIZE", "MASTER_ADDR"} & {*environment}:
        world = read_pod(environment)
    else:
        return World(0, 1, 0, 1, "none")
    inside = 0 <= world.local_rank < world.local_world_size <= world.world_size
    if not inside or not 0 <= world.rank < world.world_size:
        raise ConfigError(f"the launcher's variables contradict each other: {world}")
    return world


def read_launcher(environment: Mapping[str, str]) -> World:
    """Read the variables of torchrun, the deepspeed command, or a launcher that sets the same."""
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "environment"
    local_size = environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE"))
    if "LOCAL_SIZE" in environment and "LOCAL_WORLD_SIZE" not in environment:
        launcher = "deepspeed"
    try:
        return World(
            int(environment["RANK"]),
            int(environment["WORLD_SIZE"]),
            int(environment["LOCAL_RANK"]),
            int(local_size or ""),
            launcher,
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"RANK={environment['RANK']} is set, but WORLD_SIZE, LOCAL_RANK or LOCAL_WORLD_SIZE is "
            "absent or not a number; launch with torchrun or unset RANK"
        ) from error


def read_srun(environment: Mapping[str, str]) -> World:
    """Read the variables of a task of ``srun python``; the rendezvous is on the step's first node.

    MASTER_ADDR overrides the node. MASTER_PORT overrides the port, which is otherwise computed from
    the ids of job and step.
    """
    try:
        node = int(environment["SLURM_NODEID"])
        tasks = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
        number = int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
        address = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
        port = environment.get("MASTER_PORT") or str(20000 + number % 20000)
        return World(
            int(environment["SLURM_PROCID"]),
            int(environment["SLURM_STEP_NUM_TASKS"]),
            int(environment["SLURM_LOCALID"]),
            tasks[node],
            "srun",
            meeting_place(address, port),
        )
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"SLURM's variables of this step are incomplete ({error}); launch with srun, or with "
            "torchrun within it"
        ) from error


def read_pod(environment: Mapping[str, str]) -> World:
    """Read the variables of a pod of an Indexed Job with one process per pod.

    The pod's spec must set WORLD_SIZE, the number of pods, and MASTER_ADDR, the first pod's name in
    the job's headless service: ``NAME-0.SERVICE``.
    """
    try:
        return World(
            int(environment["JOB_COMPLETION_INDEX"]),
            int(environment["WORLD_SIZE"]),
            0,
            1,
            "kubernetes",
            meeting_place(environment["MASTER_ADDR"], environment.get("MASTER_PORT", "29500")),
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"JOB_COMPLETION_INDEX={environment['JOB_COMPLETION_INDEX']} is set, but {error}: give "
            "WORLD_SIZE (the job's completions) and MASTER_ADDR in the pod's env, or launch with "
            "torchrun"
        ) from error


def meeting_place(address: str, port: str) -> str:
    """Return the ``init_method`` of a rendezvous; an IPv6 address is put in brackets."""
    is_bare = ":" in address and not address.startswith("[")
    return f"tcp://[{address}]:{port}" if is_bare else f"tcp://{address}:{port}"


def launch_remedy(launcher: str, count: int) -> str:
    """Return how to launch a number of processes per node under a launcher of ``World``."""
    option = COUNT_OPTIONS.get(launcher)
    return f"use {option}={count}" if option else f"launch {count} per node"


def tasks_per_node(text: str) -> list[int]:
    """Parse SLURM's short form: ``4(x2),3`` is ``[4, 4, 3]``."""
    counts: list[int] = []
    for item in text.split(","):
        count, _, times = item.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def first_host(text: str) -> str:
    """Return the first host of SLURM's short form: ``gpu007`` of ``gpu[007-012,020],big1``.

    A name may have several ranges and text after them: ``r1n3-ib`` of ``r[1-2]n[3-4]-ib``.
    """
    found = re.match(r"(?:[^\[\],]|\[[^\[\]]+\])+", text)
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST={text!r}")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", found[0])


def require_rendezvous(world: World, environment: Mapping[str, str] = os.environ) -> str:
    """Refuse an unusable rendezvous address, for which torch would raise an obscure error.

    Returns:
        The address, ``HOST:PORT``; for a rendezvous other than TCP, its ``init_method``.

    Raises:
        ConfigError: names the variable.
    """
    scheme, _, place = world.init_method.partition("://")
    if scheme == "env":
        address, port = (environment.get(f"MASTER_{name}", "") for name in ("ADDR", "PORT"))
    elif scheme == "tcp":
        address, _, port = place.rpartition(":")
    else:
        return world.init_method
    if not address:
        raise ConfigError(
            "MASTER_ADDR is not set: export the name or address of the machine of rank 0 for every "
            "rank, or launch with torchrun"
        )
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(
            f"MASTER_PORT={port} is not a port: export the same number from 1 to 65535 for every "
            "rank, or launch with torchrun"
        )
    return f"{address}:{port}"


def require_interfaces(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse network interfaces for gloo that this machine lacks.

    Raises:
        ConfigError: names GLOO_SOCKET_IFNAME and the interfaces.
    """
    given = environment.get("GLOO_SOCKET_IFNAME", "")
    here = [name for _, name in socket.if_nameindex()]
    wanted = {name.partition(":")[0] for name in given.split(",")}  # eth0:1 is an alias of eth0
    if given and not wanted <= {*here}:
        raise ConfigError(
            f"GLOO_SOCKET_IFNAME={given}: this machine, {socket.gethostname()}, has the interfaces "
            f"{', '.join(here)}; export the name of one that all machines have, or unset it"
        )


class Host(NamedTuple):
    """Address of a rank for other ranks."""

    name: str
    """The machine's name."""
    network: str
    """Kernel and network namespace: a loopback address reaches only the processes in it. Empty:
    not known."""
    address: str
    """The address that gloo gives to other ranks; empty: that of ``GLOO_SOCKET_IFNAME``."""


def describe_host(environment: Mapping[str, str] = os.environ) -> Host:
    """Return the address of this process for other ranks."""
    name, network = socket.gethostname(), ""
    with suppress(OSError):  # a sandbox may hide either
        network = f"{BOOT_ID.read_text().strip()} {os.readlink(NETWORK_NAMESPACE)}"
    return Host(name, network, "" if environment.get("GLOO_SOCKET_IFNAME") else find_address(name))


def find_address(name: str) -> str:
    """Return the first address of this machine's name that a socket can bind, as gloo does.

    If there is none, return the loopback address, as gloo does.
    """
    with suppress(OSError):
        for family, kind, protocol, _, place in socket.getaddrinfo(
            name, None, type=socket.SOCK_STREAM
        ):
            with suppress(OSError), socket.socket(family, kind, protocol) as opened:
                opened.bind(place)
                return str(place[0])
    return "127.0.0.1"


def find_unreachable(hosts: Sequence[Host]) -> str:
    """Return a message about machines that other machines cannot reach; empty: none."""
    if len({host.network for host in hosts}) == 1:
        return ""
    found = {
        f"{host.name} ({host.address})": None
        for host in hosts
        if host.address and ipaddress.ip_address(host.address.partition("%")[0]).is_loopback
    }
    if not found:
        return ""
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    return (
        "the ranks are on several machines, and the name of a machine is its loopback address, at "
        f"which no other machine reaches it: {', '.join([*found][:MOST_NAMED])}{more}; export "
        "GLOO_SOCKET_IFNAME for every rank, the interface that connects the machines (ip -brief "
        "address lists them), or correct /etc/hosts"
    )
