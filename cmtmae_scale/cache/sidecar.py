"""The sidecar of a run: computes the parts that the trainer needs next, and deletes those behind.

Nothing is told but through files: the trainer's position in ``RUN_DIR/progress.json``, parts with
their seals in the cache. Parts are shared among sidecars by their number.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cmtmae_scale.cache.build import Builder, build_parts
from cmtmae_scale.cache.format import PARTS, Manifest, read_seal
from cmtmae_scale.runtime.progress_file import PublishedProgress, read_published_progress
from dataloading.entries import PROGRESS_S

logger = logging.getLogger(__name__)

PAUSE_S = 0.2
PATIENCE_S = 3600.0
"""How long a run may stand still before its sidecar leaves, seconds."""


ABANDONED_S = 600.0
"""Age of a draft that nobody finishes any more, seconds."""


class Follower:
    """Says which part is worth computing now.

    Args:
        folder: ``cache.dir``.
        manifest: the cache's, keyed by position.
        run_dir: the run's folder.
        stripe: this process's number, and how many share the parts.
        ahead: parts ahead of the trainer.
        between: parts that lie between two checkpoints.
        patience_s: see ``PATIENCE_S``.
        clock: seconds.
        pause: waits so many seconds.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        run_dir: Path,
        stripe: tuple[int, int],
        ahead: int,
        between: int,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.run_dir = run_dir
        self.number, self.of = stripe
        self.ahead = ahead
        self.most = ahead + 2 * between + 1
        """Parts on storage at any time: a save may take as long as the time between two."""
        self.patience_s = patience_s
        self.clock = clock
        self.pause = pause
        self.standing: PublishedProgress | None = None
        self.moved_at = clock()
        self.rate = 0.0
        """Views a second that the trainer takes, lately."""
        self.stride = 0
        """Views of its last move."""
        self.part_s = 0.0
        """Seconds that the last part took."""
        self.ended = False

    def parts(self) -> Iterator[int]:
        """Parts to compute, each when it is time; ends with the run, or where it stands still."""
        last = None
        while True:
            began = self.clock()
            self.watch()
            if self.ended or self.clock() - self.moved_at > self.patience_s:
                return
            part = self.choose(last)
            if part is None:
                self.pause(PAUSE_S)
                continue
            yield part
            last, self.part_s = part, self.clock() - began

    def watch(self) -> None:
        """See where the trainer is, how fast it goes, and delete what no restart will want."""
        found = read_published_progress(self.run_dir)
        if found is None or found == self.standing:
            return
        now = self.clock()
        if self.standing is not None and found.position > self.standing.position:
            self.stride = found.position - self.standing.position
            rate = self.stride / max(now - self.moved_at, 1e-3)
            self.rate = rate if not self.rate else 0.7 * self.rate + 0.3 * rate
        moved = self.standing is None or found.saved != self.standing.saved
        self.standing, self.moved_at = found, now
        self.ended = found.saved >= found.end
        if moved:
            self.delete_behind()

    def delete_behind(self) -> None:
        """Delete the parts that lie before the last saved position."""
        if self.standing is not None:
            delete_before(self.folder, self.standing.saved // self.manifest.rows_a_part)

    def choose(self, last: int | None) -> int | None:
        """The first part of ours that is missing and will be there before the trainer; or none.

        Args:
            last: part that may still be in writing.
        """
        if self.standing is None:
            return None
        size = self.manifest.rows_a_part
        # A part can be read when it is computed and written, about twice the time of one of them.
        since = max(self.clock() - self.moved_at, 1e-3)
        needed = self.standing.position + min(self.rate, self.stride / since) * 2 * self.part_s
        last_worth = min(
            self.standing.position // size + self.ahead,
            self.standing.saved // size + self.most - 1,
            (self.standing.end - 1) // size,
        )
        first = max(min(math.ceil(needed / size), last_worth), self.standing.position // size)
        first += (self.number - first) % self.of
        for part in range(first, last_worth + 1, self.of):
            if part != last and read_seal(self.folder, part) is None:
                return part
        return None


def follow(builder: Builder, follower: Follower) -> bool:
    """Stay ahead of a run; returns whether it was followed to its end.

    Raises:
        CacheError: if the store refuses a part.
    """
    began = told = time.monotonic()

    def tell(rows: int) -> None:
        nonlocal told
        standing, now = follower.standing, time.monotonic()
        if standing is not None and now - told >= PROGRESS_S:
            told = now
            logger.info(
                "the run is at view %d of %d, saved at %d; %d views computed, %.0f a second",
                *(standing.position, standing.end, standing.saved, rows, rows / (now - began)),
            )

    build_parts(builder, follower.folder, follower.manifest, follower.parts(), tell)
    if follower.ended:
        follower.delete_behind()  # what was in writing too
        logger.info("%s is complete", follower.run_dir)
    else:
        logger.warning(
            "%s has not moved for %.0f s; run me again when it does",
            follower.run_dir,
            follower.patience_s,
        )
    return follower.ended


def delete_before(folder: Path, first: int) -> None:
    """Delete parts whose number is below ``first``, seals before files, and abandoned drafts."""
    behind: list[Path] = []
    for path in (folder / PARTS).glob("*"):
        number = path.name.lstrip(".").partition(".")[0]
        if number.isdigit() and int(number) < first and not is_in_work(path):
            behind.append(path)
    for path in sorted(behind, key=lambda one: one.suffix != ".json"):
        path.unlink(missing_ok=True)


def is_in_work(path: Path) -> bool:
    """Whether a file is a draft that another process may be writing."""
    if not path.name.startswith(".") and path.suffix != ".tmp":
        return False
    try:
        return time.time() - path.stat().st_mtime < ABANDONED_S
    except OSError:
        return True
