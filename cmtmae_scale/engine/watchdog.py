"""Ranks that hang or die: seen by the others, named, and ended with everybody's stacks on disk.

Collectives notice a peer that is gone only where a connection breaks, and one that hangs only at
their own time limit, without a name. Here a thread on every rank looks after its own progress,
tells of it in ``RUN_DIR/heartbeats/RANK``, and watches the processes of the ranks on its machine.
Nothing compares the clocks of two machines: a file that does not change while this rank counts
seconds is a rank that stands still.
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

from cmtmae_scale.runtime.collectives import barrier, gather_texts
from cmtmae_scale.runtime.lock import identify_process
from cmtmae_scale.runtime.processes import start_ticks

logger = logging.getLogger(__name__)

HEARTBEATS, STACKS = "heartbeats", "stacks"
SLOW_STAGE_FACTOR = 5.0
"""Factor of the limit in the first step, in saves and in side tasks."""
STAGES = ("data", "compute", "update", "save", "evaluation", "figures", "diagnostics")
"""Stages of a step, in order; the last three are side tasks."""
TICK_S = 0.5
LONGEST_BEAT_S = 10.0


@dataclass
class Place:
    """Where in the loop a rank is; the loop writes, the watchdog reads."""

    step: int = 0
    """Step that is being taken."""
    micro_step: int = 0
    """Micro-step within it."""
    stage: str = "start"
    """One of ``STAGES``; ``start`` before the first."""
    warm: bool = False
    """Whether a step has been finished since the start."""
    since: float = field(default_factory=time.monotonic)
    """When it came here, ``time.monotonic()``."""

    def enter(self, stage: str, step: int, micro_step: int = 0) -> None:
        """Note that a stage begins."""
        if step != self.step and self.stage != "start":
            self.warm = True
        self.step, self.micro_step, self.stage = step, micro_step, stage
        self.since = time.monotonic()

    def limit_s(self, hang_s: float) -> float:
        """Seconds that the present stage may last."""
        usual = self.warm and self.stage in ("data", "compute", "update")
        return hang_s if usual else SLOW_STAGE_FACTOR * hang_s

    def __str__(self) -> str:
        return f"step {self.step}, micro-step {self.micro_step}, {self.stage}"


class Watchdog(threading.Thread):
    """Watches this rank and its neighbours; ends the process when the run cannot go on.

    Args:
        run_dir: the run's folder.
        rank: this rank.
        place: where this rank is.
        hang_s: seconds without progress that count as a hang; ``None``: no limit.
        ranks: every rank's process, as ``identify_process`` describes it.
        last_words: called with the reason before the process is ended.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        place: Place,
        hang_s: float | None,
        ranks: list[dict[str, Any]],
        last_words: Callable[[str], None],
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
        self.last_words = last_words
        self.over = threading.Event()
        self.count = 0
        self.told = float("-inf")

    def run(self) -> None:
        """Look around until the run is over."""
        suspected: list[int] = []
        while not self.over.wait(min(TICK_S, self.hang_s / 4)):
            self.beat()
            dead = self.dead()
            if dead and dead == suspected:
                self.end(f"rank {', '.join(map(str, dead))} died on this machine")
                return
            suspected = dead
            stood_s = time.monotonic() - self.place.since
            if stood_s > self.place.limit_s(self.hang_s):
                late = self.late()
                if self.over.is_set():
                    return
                self.end(f"no progress for {stood_s:.1f} s ({self.place}); {late}")
                return

    def dead(self) -> list[int]:
        """Ranks of this machine whose process is gone."""
        neighbours = self.neighbours.items()
        return [number for number, one in neighbours if start_ticks(one["pid"]) != one["started"]]

    def beat(self) -> None:
        """Tell where this rank is, if it is time to; a store that refuses is no failure."""
        if time.monotonic() - self.told < self.beat_s:
            return
        self.told = time.monotonic()
        self.count += 1
        place = self.place
        stage = STAGES.index(place.stage) if place.stage in STAGES else -1
        facts = {"beat": self.count, "place": [place.step, place.micro_step, stage]}
        try:
            self.beats.mkdir(exist_ok=True)
            (self.beats / f"{self.rank:05d}").write_text(json.dumps(facts) + "\n")
        except OSError as error:
            logger.debug("%s could not be written (%s)", self.beats, error)

    def late(self) -> str:
        """Name the ranks that stand still, or those that are behind the others."""
        first = self.read()
        limit = time.monotonic() + 2.5 * self.beat_s
        while time.monotonic() < limit and not self.over.wait(self.beat_s / 4):
            self.beat()
        second = self.read()
        silent = [n for n in range(self.world_size) if second.get(n) == first.get(n)]
        if silent:
            return f"no sign of life from rank {', '.join(map(str, silent))}"
        places = {number: facts["place"] for number, facts in second.items()}
        ahead = max(places.values())
        behind = [number for number, place in places.items() if place < ahead]
        if not behind:
            return "all ranks are at the same place"
        where = places[behind[0]]
        stage = STAGES[where[2]] if where[2] >= 0 else "start"
        return (
            f"rank {', '.join(map(str, behind))} is behind, at step {where[0]}, "
            f"micro-step {where[1]}, {stage}"
        )

    def read(self) -> dict[int, dict[str, Any]]:
        """Every rank's heartbeat; one that cannot be read is left out."""
        found: dict[int, dict[str, Any]] = {}
        for number in range(self.world_size):
            try:
                found[number] = json.loads((self.beats / f"{number:05d}").read_text())
            except (OSError, ValueError):
                continue
        return found

    def end(self, why: str) -> None:
        """Write every thread's stack, and end the process unless it ends by itself meanwhile."""
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
        logger.error("%s; stacks are in %s; leaving", why, self.stacks)
        self.last_words(why)
        # The others come to the same end by themselves, and write their stacks, within this time.
        self.over.wait(2 * TICK_S)
        os._exit(1)


@contextmanager
def watched(
    run_dir: Path, rank: int, place: Place, hang_s: float | None, last_words: Callable[[str], None]
) -> Iterator[None]:
    """Have this rank watched; a collective at both ends.

    Args:
        run_dir: the run's folder.
        rank: this rank.
        place: where this rank is.
        hang_s: seconds without progress that count as a hang; ``None``: no limit.
        last_words: called with the reason before the process is ended.
    """
    ranks = [json.loads(text) for text in gather_texts(json.dumps(identify_process()))]
    place.since = time.monotonic()
    dog = Watchdog(run_dir, rank, place, hang_s, ranks, last_words)
    dog.start()
    try:
        yield
    finally:
        dog.over.set()
    barrier()  # nobody leaves while another rank still watches it
