"""The process group of a run, and small agreements between its ranks on the host."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cmtmae_scale.errors import (
    CmtMaeError,
    ConfigError,
    RendezvousError,
    describe_store,
    exit_code_of,
    may_pass,
)
from cmtmae_scale.runtime.launch import (
    Host,
    World,
    describe_host,
    find_unreachable,
    launch_remedy,
    require_interfaces,
    require_rendezvous,
)
from dataloading.errors import DataError, ReadError

T = TypeVar("T")

ANY_TEXT = "surrogatepass"
"""Error handler for names of files that are not valid UTF-8, as Python decodes them."""

is_waiting = threading.Event()
"""Set while this process waits for other ranks in a function of this module."""


@contextmanager
def waiting() -> Iterator[None]:
    """Mark the block as waiting for other ranks, for the watchdog."""
    is_waiting.set()
    try:
        yield
    finally:
        is_waiting.clear()


def pick_device(world: World) -> torch.device:
    """Return this rank's GPU, or the CPU if there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if world.launcher == "srun" and count == 1:
        return torch.device("cuda", 0)  # --gpus-per-task hides the other tasks' GPUs
    if world.local_world_size > count:
        raise ConfigError(
            f"{world.local_world_size} processes on this node, but {count} GPUs; "
            + launch_remedy(world.launcher, count)
        )
    return torch.device("cuda", world.local_rank)


@contextmanager
def process_group(world: World, device: torch.device, timeout_s: float = 1800) -> Iterator[None]:
    """Open the default process group: gloo for the host, and NCCL for GPUs.

    After a failure on one of several GPUs the group stays open until the process ends: to destroy
    the group, NCCL waits for the other ranks, which wait for this rank in a collective.

    Raises:
        ConfigError: if the environment gives no usable address or interface for the rendezvous.
        RendezvousError: if the rendezvous takes more than ``timeout_s`` seconds, or rank 0's port
            is in use.
    """
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_s)
    # Otherwise gloo connects all pairs of ranks at once: 2,047 sockets per rank for 2,048 ranks.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world.launcher == "none":
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        address = require_rendezvous(world)
        require_interfaces()
        try:
            dist.init_process_group(
                backend,
                init_method=world.init_method,
                rank=world.rank,
                world_size=world.world_size,
                timeout=timeout,
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise explain_rendezvous(world, address, str(error)) from error
    try:
        require_reachable()
        yield
    except BaseException:
        if device.type == "cpu" or world.world_size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def explain_rendezvous(world: World, address: str, found: str) -> RendezvousError:
    """Return the error of a failed rendezvous; ``found`` is torch's message."""
    if "EADDRINUSE" in found:
        return RendezvousError(
            f"rank {world.rank} cannot listen at {address}: the port is in use on this machine; "
            "end the program that has it, or export another MASTER_PORT for every rank"
        )
    if world.rank == 0:
        remedy = "check that the other ranks started, and that all have the same WORLD_SIZE"
    else:
        remedy = "check that rank 0 runs on the machine of MASTER_ADDR, and that its port is open"
    return RendezvousError(
        f"rank {world.rank} of {world.world_size} could not join the other ranks at {address}: "
        f"{found.splitlines()[0].rstrip('.')}; {remedy}"
    )


def require_reachable() -> None:
    """Refuse machines to which gloo could not connect. A collective.

    The ranks compare their addresses through the store of the rendezvous: where a connection is
    refused, gloo lets the rank at its other end wait for five times the limit.

    Raises:
        ConfigError: on every rank; names the machines.
    """
    if ranks() == 1:
        return
    store = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
    store.set(f"host/{own_rank()}", json.dumps(describe_host()))
    if own_rank() == 0:
        found = store.multi_get([f"host/{rank}" for rank in range(ranks())])
        store.set("unreachable", find_unreachable([Host(*json.loads(text)) for text in found]))
    problem = store.get("unreachable").decode()
    if not problem:
        return
    store.set(f"known/{own_rank()}", "")
    if own_rank() == 0:
        with suppress(dist.DistStoreError):  # the store ends with this process
            store.wait([f"known/{rank}" for rank in range(ranks())], timedelta(seconds=10))
    raise ConfigError(problem)


def ranks(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of ranks, of all or of a group; 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def own_rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if ranks() > 1 else 0


def is_first() -> bool:
    """Return whether this is rank 0; true without a process group."""
    return own_rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    if ranks() > 1:
        with waiting():
            dist.all_reduce(torch.zeros(1))


def all_ranks_agree(mine: bool) -> bool:
    """Return whether a flag is true on every rank."""
    if ranks() == 1:
        return mine
    flag = torch.tensor([int(mine)])
    with waiting():
        dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag.item())


def broadcast_tensor(values: Tensor, source: int, group: dist.ProcessGroup | None) -> None:
    """Overwrite a tensor of each rank of a group with that of one of them. A collective.

    Args:
        values: contiguous, of the same shape and dtype on all of these ranks, on their devices.
        source: the rank whose values are taken, as counted in the default group.
        group: the ranks; ``None``: all.
    """
    with waiting():
        dist.broadcast(values, source, group)


def broadcast_int(value: int) -> int:
    """Return rank 0's integer on every rank."""
    if ranks() == 1:
        return value
    box = torch.tensor([value], dtype=torch.int64)
    with waiting():
        dist.broadcast(box, 0)
    return int(box.item())


def gather_bytes(mine: bytes, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """Return the bytes of every rank of a group, in rank order; lengths may differ. A collective.

    Received bytes are not unpickled, so that an unauthorised process cannot run code.

    Args:
        mine: this rank's bytes.
        group: this rank's group; ``None``: all ranks.
    """
    if ranks(group) == 1:
        return [mine]
    length = torch.tensor([len(mine)], dtype=torch.int64)
    lengths = [torch.zeros_like(length) for _ in range(ranks(group))]
    with waiting():
        dist.all_gather(lengths, length, group)
    longest = max(int(one) for one in lengths)
    if not longest:
        return [b""] * len(lengths)
    row = bytes_to_tensor(mine.ljust(longest, b"\0"))
    rows = [torch.empty_like(row) for _ in lengths]
    with waiting():
        dist.all_gather(rows, row, group)
    return [one[: int(n)].numpy().tobytes() for one, n in zip(rows, lengths, strict=True)]


def gather_texts(mine: str) -> list[str]:
    """Return every rank's text, in rank order. A collective.

    A text may contain names of files that are not valid UTF-8.
    """
    return [one.decode(errors=ANY_TEXT) for one in gather_bytes(mine.encode(errors=ANY_TEXT))]


def broadcast_bytes(data: bytes) -> bytes:
    """Return rank 0's bytes on every rank. A collective."""
    if ranks() == 1:
        return data
    size = broadcast_int(len(data))
    if not size:
        return b""
    box = bytes_to_tensor(data if dist.get_rank() == 0 else bytes(size))
    with waiting():
        dist.broadcast(box, 0)
    return box.numpy().tobytes()


def broadcast_text(text: str) -> str:
    """Return rank 0's text on every rank. A collective."""
    return broadcast_bytes(text.encode(errors=ANY_TEXT)).decode(errors=ANY_TEXT)


def bytes_to_tensor(data: bytes) -> Tensor:
    """Copy bytes, at least one, to a uint8 tensor ``[len(data)]``."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def on_all_ranks(action: Callable[[], T]) -> T:
    """Call a function on this rank; where it fails on one rank, fail on all. A collective.

    A rank that raised alone would leave the others waiting for it.

    Args:
        action: takes part in no collective.

    Raises:
        Exception: on a rank that failed, the action's own exception. On the other ranks a
            ``ReadError``, ``DataError`` or else ``CmtMaeError``, with the exit code and the message
            of the first rank that failed.
        StorageError: for an ``OSError`` of a store that is full or fails.
    """
    found: list[T] = []
    own: Exception | None = None
    failure: list[Any] | None = None
    try:
        found.append(action())
    except Exception as error:  # reported to the other ranks before their next collective
        own = error
        if isinstance(error, OSError) and may_pass(error):
            own = describe_store(error)
            own.__cause__ = error
        is_named = isinstance(own, CmtMaeError | DataError)
        text = str(own) if is_named else f"{type(own).__name__}: {own}"
        failure = [isinstance(own, DataError), exit_code_of(own), text]
    everyone = [json.loads(text) for text in gather_texts(json.dumps(failure))]
    if own is not None:
        raise own
    for rank, other in enumerate(everyone):
        if other is not None:
            is_data, code, text = other
            kind = DataError if is_data else CmtMaeError
            kind = ReadError if is_data and code == ReadError.exit_code else kind
            error = kind(f"rank {rank}: {text}" if rank else text)
            error.exit_code = int(code)
            raise error
    return found[0]


def on_all_ranks_for_long(action: Callable[[], T], pause_s: float = 1.0) -> T:
    """Call a function like ``on_all_ranks`` that may exceed the time limit of a collective.

    The ranks synchronise every ``pause_s`` seconds until all have returned: a rank that waited in
    one collective would end the run at its time limit, and every later launch too. A collective.

    Args:
        action: takes part in no collective; runs in a thread.
        pause_s: seconds between two synchronisations.

    Raises:
        Exception: see ``on_all_ranks``.
    """
    if ranks() == 1:
        return on_all_ranks(action)
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # raised in the main thread
            future.set_exception(error)

    threading.Thread(target=work, name="long action", daemon=True).start()
    while True:
        wait([future], pause_s)
        if all_ranks_agree(future.done()):
            return on_all_ranks(future.result)
