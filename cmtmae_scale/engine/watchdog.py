"""A watchdog against ranks that hang or die: it names them, writes all stacks, and ends the run.

Collectives detect a dead peer only if a connection breaks, and a stalled peer only at their own
time limit, without naming it. Here a thread on every rank checks the progress of its rank,
publishes it in ``RUN_DIR/heartbeats/RANK``, and checks the processes of the ranks on its machine.
The clocks of two machines are never compared: a heartbeat that does not change while this rank
counts seconds belongs to a stalled rank.
"""

import faulthandler
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmtmae_scale.errors import EXIT_CRASH
from cmtmae_scale.runtime.collectives import barrier, gather_texts, is_waiting
from cmtmae_scale.runtime.lock import identify_process
from cmtmae_scale.runtime.processes import start_ticks
from cmtmae_scale.runtime.storage import warn_unwritten

logger = logging.getLogger(__name__)

HEARTBEATS, STACKS = "heartbeats", "stacks"
SLOW_STAGE_FACTOR = 5.0
"""Factor of the limit in the first step, in saves and in side tasks."""
STAGES = ("data", "compute", "update", "save", "evaluation", "figures", "diagnostics")
"""Stages of a step, in order; the last three are side tasks."""
BUILD_STAGES = ("start", "index", "checkpoint", "models", "stream")
"""Stages before the first step, in order."""
BUSY_CPU_FRACTION = 0.05
"""Fraction of one core above which a rank that builds the run counts as working."""
BUSY_BYTES_PER_S = 1e5
"""Bytes read and written per second above which a rank that builds the run counts as working."""
TICK_S = 0.5
LONGEST_BEAT_S = 10.0


@dataclass
class Place:
    """Place of a rank in the loop; the loop writes it, the watchdog reads it."""

    step: int = 0
    """Step in progress."""
    micro_step: int = 0
    """Micro-step within it."""
    stage: str = "start"
    """One of ``BUILD_STAGES`` or ``STAGES``."""
    warm: bool = False
    """Whether a step has finished since the launch."""
    since: float = field(default_factory=time.monotonic)
    """When the stage began, ``time.monotonic()``."""

    def enter(self, stage: str, step: int, micro_step: int = 0) -> None:
        """Record that a stage begins."""
        if step != self.step and self.stage in STAGES:
            self.warm = True
        self.step, self.micro_step, self.stage = step, micro_step, stage
        self.since = time.monotonic()

    def limit_s(self, hang_s: float) -> float:
        """Return the seconds that the present stage may last."""
        usual = self.warm and self.stage in ("data", "compute", "update")
        return hang_s if usual else SLOW_STAGE_FACTOR * hang_s

    def __str__(self) -> str:
        return f"step {self.step}, micro-step {self.micro_step}, {self.stage}"


class Watchdog(threading.Thread):
    """Watches this rank and its neighbours; ends the process when the run cannot continue.

    Args:
        run_dir: the run's folder.
        rank: this rank.
        place: place of this rank.
        hang_s: seconds without progress that count as a hang; ``None``: no limit.
        ranks: process of every rank, as ``identify_process`` returns it.
        report: called with the reason before the process ends; may return its exit code.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        place: Place,
        hang_s: float | None,
        ranks: list[dict[str, Any]],
        report: Callable[[str], int | None],
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.beats = run_dir / HEARTBEATS
        self.stacks = run_dir / STACKS / f"rank-{rank:05d}.txt"
        self.rank = rank
        self.place = place
        self.hang_s = float("inf") if hang_s is None else hang_s
        self.beat_s = min(LONGEST_BEAT_S, max(self.hang_s / 20, TICK_S))
        me = ranks[rank]
        self.neighbours = {
            number: one
            for number, one in enumerate(ranks)
            if one["pids"] == me["pids"] and number != rank
        }
        self.world_size = len(ranks)
        self.report = report
        self.over = threading.Event()
        self.count = 0
        self.published_at = float("-inf")

    def run(self) -> None:
        """Check until the run is over."""
        suspected: list[int] = []
        while not self.over.wait(min(TICK_S, self.hang_s / 4)):
            self.beat()
            dead = self.find_dead()
            if dead and dead == suspected:
                self.end(f"rank {', '.join(map(str, dead))} died on this machine")
                return
            suspected = dead
            stalled_s = time.monotonic() - self.place.since
            if stalled_s > self.place.limit_s(self.hang_s):
                late = self.name_late()
                if self.over.is_set():
                    return
                if not late:
                    self.place.since = time.monotonic()
                    continue
                self.end(f"no progress for {stalled_s:.1f} s ({self.place}); {late}")
                return

    def find_dead(self) -> list[int]:
        """Return the ranks of this machine whose process has ended."""
        neighbours = self.neighbours.items()
        return [number for number, one in neighbours if start_ticks(one["pid"]) != one["started"]]

    def beat(self) -> None:
        """Publish the place of this rank when due; an error of the store only causes a warning."""
        if time.monotonic() - self.published_at < self.beat_s:
            return
        self.published_at = time.monotonic()
        self.count += 1
        place = self.place
        stage = (BUILD_STAGES + STAGES).index(place.stage) - len(BUILD_STAGES)
        facts = {
            "beat": self.count,
            "place": [place.step, place.micro_step, stage],
            "waits": is_waiting.is_set(),
            "work": [time.process_time(), bytes_moved()],
        }
        try:
            self.beats.mkdir(exist_ok=True)
            (self.beats / f"{self.rank:05d}").write_text(json.dumps(facts) + "\n")
        except OSError as error:
            if self.rank == 0:
                warn_unwritten(self.beats, error)

    def name_late(self) -> str:
        """Return the stalled ranks, or those behind the others, as text.

        While the run is built, empty if no rank is stalled and some rank works: listing many images
        or fetching weights may take longer than any limit.
        """
        first = self.read_heartbeats()
        began = time.monotonic()
        limit = time.monotonic() + 2.5 * self.beat_s
        while time.monotonic() < limit and not self.over.wait(self.beat_s / 4):
            self.beat()
        second = self.read_heartbeats()
        silent = [n for n in range(self.world_size) if second.get(n) == first.get(n)]
        if silent:
            return f"no heartbeat from rank {', '.join(map(str, silent))}"
        watched_s = time.monotonic() - began
        if self.place.stage in BUILD_STAGES and any(
            is_working(first[n], second[n], watched_s) for n in first.keys() & second.keys()
        ):
            return ""
        places = {number: facts["place"] for number, facts in second.items()}
        ahead = max(places.values())
        behind = [number for number, place in places.items() if place < ahead]
        if not behind and any(facts.get("waits") for facts in second.values()):
            behind = [number for number, facts in second.items() if not facts.get("waits")]
        if not behind:
            return "all ranks are at the same place"
        where = places[behind[0]]
        stage = (BUILD_STAGES + STAGES)[where[2] + len(BUILD_STAGES)]
        return (
            f"rank {', '.join(map(str, behind))} is behind, at step {where[0]}, "
            f"micro-step {where[1]}, {stage}"
        )

    def read_heartbeats(self) -> dict[int, dict[str, Any]]:
        """Return the heartbeats that can be read, by rank."""
        found: dict[int, dict[str, Any]] = {}
        for number in range(self.world_size):
            try:
                found[number] = json.loads((self.beats / f"{number:05d}").read_text())
            except (OSError, ValueError):
                continue
        return found

    def end(self, why: str) -> None:
        """Write the stacks of all threads, and end the process unless it ends by itself."""
        try:
            self.stacks.parent.mkdir(exist_ok=True)
            with self.stacks.open("w") as file:
                file.write(f"rank {self.rank}, {self.place}: {why}\n")
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError as error:
            logger.warning("%s could not be written (%s)", self.stacks, error)
        if self.over.wait(TICK_S):
            return
        logger.error("%s; stacks are in %s; exiting", why, self.stacks)
        code = self.report(why)
        # The other ranks find the same, and write their stacks, within this time.
        self.over.wait(2 * TICK_S)
        os._exit(code or EXIT_CRASH)


def is_working(first: dict[str, Any], second: dict[str, Any], seconds: float) -> bool:
    """Return whether a rank computed, read or wrote between two heartbeats."""
    try:
        (cpu_s, moved), (later_cpu_s, later_moved) = first["work"], second["work"]
    except (KeyError, TypeError, ValueError):
        return False
    busy = later_cpu_s - cpu_s > BUSY_CPU_FRACTION * seconds
    return busy or later_moved - moved > BUSY_BYTES_PER_S * seconds


def bytes_moved() -> int:
    """Return the bytes that this process has read and written; 0 if the system hides them."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
        facts = dict(line.split(": ") for line in lines)
        return int(facts["rchar"]) + int(facts["wchar"])
    except (OSError, ValueError, KeyError):
        return 0


@contextmanager
def watched(
    run_dir: Path,
    rank: int,
    place: Place,
    hang_s: float | None,
    report: Callable[[str], int | None],
) -> Iterator[Watchdog]:
    """Watch this rank in the block; a collective at both ends.

    Args:
        run_dir: the run's folder.
        rank: this rank.
        place: place of this rank.
        hang_s: seconds without progress that count as a hang; ``None``: no limit.
        report: called with the reason before the process ends; may return its exit code.
    """
    ranks = [json.loads(text) for text in gather_texts(json.dumps(identify_process()))]
    place.since = time.monotonic()
    dog = Watchdog(run_dir, rank, place, hang_s, ranks, report)
    dog.start()
    try:
        yield dog
    finally:
        dog.over.set()
    barrier()  # no rank exits while another rank still watches it
