"""Ranks of which one works for long."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.runtime import collectives


def exchange_texts(text: str) -> tuple[str, list[str]]:
    """A text of rank 0, and a text of each rank."""
    import torch.distributed as dist

    return collectives.broadcast_text(text), collectives.gather_texts(f"{text}{dist.get_rank()}")


class Meetings:
    """How often the ranks have met in ``all_ranks_agree``; ``met`` is set at the wanted number."""

    def __init__(self) -> None:
        self.count, self.met = 0, threading.Event()


@contextmanager
def counted_meetings(wanted: int) -> Iterator[Meetings]:
    """Count the meetings of the ranks within the block."""
    meetings, agree = Meetings(), collectives.all_ranks_agree

    def count(mine: bool) -> bool:
        meetings.count += 1
        if meetings.count == wanted:
            meetings.met.set()
        return agree(mine)

    collectives.all_ranks_agree = count
    try:
        yield meetings
    finally:
        collectives.all_ranks_agree = agree


def work_for_long(fails: bool) -> tuple[str, int]:
    """Rank 1 works until the ranks have met five times; returns the outcome on this rank."""
    import torch.distributed as dist

    with counted_meetings(5) as meetings:

        def action() -> str:
            if dist.get_rank() == 1:
                assert meetings.met.wait(30)
                if fails:
                    raise ConfigError("no images")
            return f"done on {dist.get_rank()}"

        try:
            return collectives.on_all_ranks_for_long(action, pause_s=0.01), meetings.count
        except Exception as error:
            return str(error), meetings.count


def meet_on_machines(address: str) -> str:
    """Ranks of a machine each, rank 1's of this address; returns why they cannot connect."""
    import torch.distributed as dist

    rank, describe = dist.get_rank(), collectives.describe_host
    host = describe()._replace(name=f"node{rank}", network=f"{rank}", address="10.0.0.1")
    collectives.describe_host = lambda: host._replace(address=address) if rank else host
    try:
        collectives.require_reachable()
    except ConfigError as error:
        return str(error)
    finally:
        collectives.describe_host = describe
    return ""
