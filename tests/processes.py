"""Run a function on several gloo ranks: forkserver with torch preloaded, every traceback shown."""

import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])


def entry(
    rank: int,
    world_size: int,
    rendezvous: str,
    results: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        value = function(*arguments)
        dist.barrier()
        results.put((rank, True, value))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        results.close()
        results.join_thread()
        os._exit(1)


@contextmanager
def started(
    world_size: int, function: Callable[..., Any], *arguments: Any
) -> Iterator[tuple[list[Any], Any]]:
    """Run ``function(*arguments)`` on ranks; yield their processes and the queue of results."""
    results = CONTEXT.Queue()
    with tempfile.TemporaryDirectory() as folder:
        children = [
            CONTEXT.Process(
                target=entry,
                args=(rank, world_size, f"{folder}/meet", results, function, arguments),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for child in children:
            child.start()
        try:
            yield children, results
        finally:
            for child in children:
                child.join(timeout=5)
                if child.is_alive():
                    child.kill()
                    child.join()


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120
) -> list[Any]:
    """Call ``function(*arguments)`` on every rank; returns the results in rank order.

    Results must be plain values (numbers, strings, lists, numpy arrays).
    """
    with started(world_size, function, *arguments) as (children, results):
        return collect(children, results, timeout_s)


def kill_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, after_s: float
) -> None:
    """Start ``function(*arguments)`` on every rank and kill all of them after a time."""
    with started(world_size, function, *arguments) as (children, _):
        time.sleep(after_s)
        for child in children:
            child.kill()


def collect(children: list[Any], results: Any, timeout_s: float) -> list[Any]:
    values: dict[int, Any] = {}
    failures: dict[int, str] = {}
    limit = time.monotonic() + timeout_s
    while len(values) + len(failures) < len(children):
        try:
            rank, fine, value = results.get(timeout=0.2)
        except queue.Empty:
            if time.monotonic() > limit:
                raise TimeoutError(f"only ranks {sorted(values)} answered; {failures}") from None
            dead = [c for c in children if c.exitcode not in (None, 0)]
            if failures and dead:
                limit = min(limit, time.monotonic() + 3)
            continue
        (values if fine else failures)[rank] = value
    if failures:
        raise AssertionError("\n".join(f"rank {r}:\n{text}" for r, text in failures.items()))
    return [values[rank] for rank in range(len(children))]
