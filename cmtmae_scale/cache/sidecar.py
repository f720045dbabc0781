"""Sidecar of a run: computes the shards that the run needs next, and deletes those behind it.

Run and sidecar communicate through files only: the run publishes its position in
``RUN_DIR/progress.json``, the sidecar publishes shards in the cache. Sidecars share the shards by
number.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from cmtmae_scale.cache.build import Builder, build_shards, make_builder
from cmtmae_scale.cache.format import (
    SHARDS,
    SHARDS_PER_FOLDER,
    Manifest,
    is_recent_draft,
    list_shard_folders,
    shard_exists,
)
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.teachers import cache_folder
from cmtmae_scale.runtime.lock import has_holder
from cmtmae_scale.runtime.progress_file import PublishedProgress, read_published_progress
from dataloading.progress import PROGRESS_S

logger = logging.getLogger(__name__)

POLL_S = 0.2
EXTENDED_S = 60.0
"""Seconds in which a launch that makes a complete run longer takes the run's lock. It publishes its
progress only when it has built everything."""


class Sidecar:
    """Chooses the next shard to compute from the published progress of a run.

    Args:
        folder: ``cache.dir``.
        manifest: the cache's, keyed by position.
        run_dir: the run's folder.
        stripe: number of this process, and the number of processes that share the shards.
        ahead: shards ahead of the run.
        between: shards between two checkpoints.
        patience_s: seconds without progress of the run after which the sidecar ends.
        clock: returns the time in seconds.
        pause: waits for the given seconds.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        run_dir: Path,
        stripe: tuple[int, int],
        ahead: int,
        between: int,
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.run_dir = run_dir
        self.number, self.count = stripe
        self.ahead = ahead
        self.max_shards = ahead + 2 * between + 1
        """Maximum number of shards on storage: a save may take as long as the time to the next."""
        self.patience_s = patience_s
        self.clock = clock
        self.pause = pause
        self.progress: PublishedProgress | None = None
        self.first: PublishedProgress | None = None
        """What the run had published before this process began."""
        self.moved_at = clock()
        self.rate = 0.0
        """Recent views per second of the run."""
        self.stride = 0
        """Views between the last two published positions."""
        self.shard_s = 0.0
        """Seconds that the last shard took."""
        self.ended = False

    def shards(self) -> Iterator[int]:
        """Yield shards to compute when they are due; ends with the run, or when the run stalls."""
        last = None
        while True:
            began = self.clock()
            self.update_progress()
            self.ended = self.is_over()
            if self.ended or self.clock() - self.moved_at > self.patience_s:
                return
            shard = self.choose_shard(last)
            if shard is None:
                self.pause(POLL_S)
                continue
            yield shard
            last, self.shard_s = shard, self.clock() - began

    def update_progress(self) -> None:
        """Read the run's progress, estimate its rate, and delete shards that no restart needs."""
        found, before = read_published_progress(self.run_dir), self.progress
        if found is None or found == before:
            return
        now = self.clock()
        if before is not None and found.position > before.position:
            self.stride = found.position - before.position
            rate = self.stride / max(now - self.moved_at, 1e-3)
            self.rate = rate if not self.rate else 0.7 * self.rate + 0.3 * rate
        self.progress, self.moved_at = found, now
        if before is None:
            self.first = found
            if found.saved >= found.end:
                text = "%s is complete; waiting %.0f s for a launch that makes it longer"
                logger.info(text, self.run_dir, EXTENDED_S)
        if before is None or found.saved != before.saved:
            self.delete_behind()

    def is_over(self) -> bool:
        """Return whether the run is complete."""
        progress = self.progress
        if progress is None or progress.saved < progress.end:
            return False
        if progress != self.first:
            return True
        limit_s = min(EXTENDED_S, self.patience_s)
        return self.clock() - self.moved_at > limit_s and not has_holder(self.run_dir)

    def delete_behind(self) -> None:
        """Delete the shards before the last saved position."""
        if self.progress is not None:
            delete_shards_before(self.folder, self.progress.saved // self.manifest.rows_per_shard)

    def choose_shard(self, last: int | None) -> int | None:
        """Return this process's first missing shard that can be complete before the run needs it.

        Args:
            last: shard that may still be being written.
        """
        if self.progress is None:
            return None
        size, position = self.manifest.rows_per_shard, self.progress.position
        # A shard is readable once it is computed and written: about twice the time of one shard.
        since = max(self.clock() - self.moved_at, 1e-3)
        reached = position + min(self.rate, self.stride / since) * 2 * self.shard_s
        last_useful = min(
            position // size + self.ahead,
            self.progress.saved // size + self.max_shards - 1,
            (self.progress.end - 1) // size,
        )
        first = max(min(math.ceil(reached / size), last_useful), position // size)
        first += (self.number - first) % self.count
        for shard in range(first, last_useful + 1, self.count):
            if shard != last and not shard_exists(self.folder, self.manifest, shard):
                return shard
        return None


def run_sidecar(
    config: Config,
    run_dir: Path,
    index_folder: Path,
    stripe: tuple[int, int],
    device: torch.device,
    ahead: int,
    rows_per_shard: int | None,
    patience_s: float,
) -> bool:
    """Compute the shards that a run needs next; return whether the run is complete.

    ``rows_per_shard`` applies to a cache that is begun here, by default ``SHARD_ROWS``; see
    ``Sidecar`` for the other arguments.

    Raises:
        CacheError: a folder that holds another cache, or a store that refuses a shard.
    """
    folder = cache_folder(config)
    builder = make_builder(config, index_folder, device, "positions")
    try:
        manifest = builder.begin_cache(folder, config.cache.codec, rows_per_shard)
        views = config.checkpoint.every * config.train.global_batch_size
        between = -(-views // manifest.rows_per_shard)
        sidecar = Sidecar(folder, manifest, run_dir, stripe, ahead, between, patience_s)
        shards = sidecar.max_shards
        max_gb = shards * manifest.rows_per_shard * manifest.row_bytes() / 1e9
        text = "sidecar of %s in %s: at most %d shards, %.2f GB"
        logger.info(text, run_dir, folder, shards, max_gb)
        build_ahead(builder, sidecar)
    finally:
        builder.close()
    return sidecar.ended


def build_ahead(builder: Builder, sidecar: Sidecar) -> None:
    """Build the shards that a sidecar chooses until the run ends or stalls.

    Raises:
        CacheError: if the store refuses a shard.
    """
    began = logged_at = time.monotonic()

    def log_progress(rows: int) -> None:
        nonlocal logged_at
        progress, now = sidecar.progress, time.monotonic()
        if progress is not None and now - logged_at >= PROGRESS_S:
            logged_at = now
            at = f"{progress.position} of {progress.end}, saved at {progress.saved}"
            logger.info("run at view %s; %d views, %.0f views/s", at, rows, rows / (now - began))

    build_shards(builder, sidecar.folder, sidecar.manifest, sidecar.shards(), log_progress)
    if sidecar.ended:
        sidecar.delete_behind()  # including the shard that was being written
        logger.info("%s is complete", sidecar.run_dir)
    else:
        text = "%s has made no progress for %.0f s; run the same command again when it does"
        logger.warning(text, sidecar.run_dir, sidecar.patience_s)


def delete_shards_before(folder: Path, first: int) -> None:
    """Delete shards below ``first``, abandoned drafts beside them, and folders without shards.

    Folders that hold later shards only are not listed.
    """
    delete_files_before(folder / SHARDS, first)  # format 1; format 2 has only folders there
    for place in list_shard_folders(folder):
        if int(place.name) <= first // SHARDS_PER_FOLDER:
            delete_files_before(place, first)
        if int(place.name) < first // SHARDS_PER_FOLDER:
            with suppress(OSError):  # another sidecar has deleted it, or is writing a shard late
                place.rmdir()


def delete_files_before(place: Path, first: int) -> None:
    """Delete the shards below ``first`` in one folder, seals before files."""
    try:
        paths = [place / name for name in os.listdir(place)]
    except FileNotFoundError:
        return
    behind: list[Path] = []
    for path in paths:
        number, dot, _ = path.name.lstrip(".").partition(".")
        is_behind = dot and number.isdecimal() and int(number) < first
        if is_behind and not is_recent_draft(path):
            behind.append(path)
    for path in sorted(behind, key=lambda path: path.suffix != ".json"):
        path.unlink(missing_ok=True)
