"""Build the pieces of an index: in threads, in helper processes, and on the ranks of a launch.

A piece is a shard or some thousand files of a folder. Every process takes each n-th piece and keeps
its result in ``parts``. The process that combines the parts examines missing pieces itself, so that
a helper may be killed, or refuse a piece, at any time.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dataloading.entries import READERS, File, map_in_threads
from dataloading.errors import DataError, ReadError
from dataloading.folders import FOLDER_PIECE, examine_files
from dataloading.listing import Files, map_files, write_files
from dataloading.parquet_index import examine_parquet
from dataloading.parts import LISTING, Part, Parts
from dataloading.patience import PATIENCE_S, Patience
from dataloading.shard_names import is_parquet
from dataloading.shards import Shard
from dataloading.stores import LISTING_IN_FLIGHT, RemoteTar, as_root, place_from_text, place_to_text
from dataloading.webdataset import examine_shard

logger = logging.getLogger(__name__)

_PIECES_PER_HELPER = 16  # fewer are not worth the start of a process
_MAX_HELPERS = 31


def make_pieces(files: Files, shards: Sequence[Shard]) -> list[range]:
    """Return the rows of a listing that are examined together: one shard, or neighbours."""
    step = 1 if shards else FOLDER_PIECE
    return [range(at, min(at + step, len(files))) for at in range(0, len(files), step)]


def write_listing(files: Files, shards: Sequence[Shard], folder: Path) -> None:
    """Write a listing into the folder of parts, for ``help_build``, if it can be written."""
    with contextlib.suppress(OSError):
        write_files(files, [place_to_text(shard.path) for shard in shards], folder / LISTING)


def build_parts(
    root: Path | str, shards: Sequence[Shard], parts: Parts, max_pixels: int, exif_orientation: bool
) -> Callable[[int], Part]:
    """Examine all pieces that are missing, with helper processes where there are many.

    Returns:
        A function from the number of a piece to its part, which examines a damaged part again.

    Raises:
        DataError: if a file is not a tar or cannot be read.
        ReadError: if storage fails for longer than reads are retried.
    """
    work = _Examiner(root, shards, parts, max_pixels, exif_orientation)
    everything = range(len(parts.pieces))
    helpers = 0
    if parts.folder is not None:
        number = sum(not parts.has(piece) for piece in everything) // _PIECES_PER_HELPER
        helpers = min(len(os.sched_getaffinity(0)) - 1, number, _MAX_HELPERS)
    if helpers > 0 and parts.folder is not None:
        write_listing(parts.files, shards, parts.folder)
        with _helpers(root, parts.folder, helpers, max_pixels, exif_orientation):
            work.examine_missing(everything[:: helpers + 1])
    work.examine_missing(everything)
    return work.recall


def help_build(
    root: Path | str, folder: Path, share: tuple[int, int], max_pixels: int, exif_orientation: bool
) -> None:
    """Examine this process's share of the missing pieces of a listing that is shared.

    Nothing is kept of a piece in which a file cannot be read here or has another size than listed:
    another machine may find the file as listed.

    Args:
        root: the data set.
        folder: of the parts.
        share: number of this process, and number of processes.
        max_pixels: as for ``build_index``.
        exif_orientation: as for ``build_index``.

    Raises:
        ReadError: if storage fails for longer than reads are retried.
    """
    try:
        files, paths = map_files(folder / LISTING)
    except (OSError, ValueError):  # another machine's folder; that machine does the work
        return
    names = zip(paths, files.names if paths else (), files.sizes.tolist(), strict=False)
    shards = [Shard(place_from_text(path), File(name, size, 0)) for path, name, size in names]
    parts = Parts(folder, files, make_pieces(files, shards), max_pixels, exif_orientation)
    work = _Examiner(root, shards, parts, max_pixels, exif_orientation, helps=True)
    number, count = share
    work.examine_missing(range(number, len(parts.pieces), count))


class _Examiner:
    """Examines pieces; see ``build_parts`` and ``help_build``."""

    def __init__(
        self,
        root: Path | str,
        shards: Sequence[Shard],
        parts: Parts,
        max_pixels: int,
        exif_orientation: bool,
        helps: bool = False,
    ) -> None:
        self._root, self._shards, self._parts, self._helps = root, shards, parts, helps
        self._settings = max_pixels, exif_orientation
        self._patience = Patience(PATIENCE_S)

    def examine_missing(self, pieces: Sequence[int]) -> None:
        parts = self._parts
        missing = [piece for piece in pieces if not parts.has(piece)]
        sizes = [len(parts.pieces[piece]) for piece in missing]
        is_remote = bool(self._shards) and isinstance(self._shards[0].path, RemoteTar)
        threads = LISTING_IN_FLIGHT if is_remote else READERS
        is_tars = bool(self._shards) and not is_parquet(self._shards[0].file.name)
        map_in_threads(self._work, missing, sizes, "tars" if is_tars else "files", threads)

    def recall(self, piece: int) -> Part:
        part = self._parts.recall(piece)
        if part is None:
            part = self._examine(piece)
            self._parts.keep(piece, part)
        return part

    def _work(self, piece: int) -> None:
        if self._parts.has(piece):  # another process was faster
            return
        try:
            if not self._helps or self._is_as_listed(piece):
                self._parts.keep(piece, self._examine(piece))
        except ReadError:
            raise
        except DataError:
            if not self._helps:
                raise

    def _is_as_listed(self, piece: int) -> bool:
        path, file = self._shards[piece] if self._shards else (None, None)
        if not isinstance(path, Path) or file is None:  # a store compares the version
            return True
        try:
            return path.stat().st_size == file.size
        except OSError:
            return False

    def _examine(self, piece: int) -> Part:
        if self._shards:
            shard = self._shards[piece]
            examine = examine_parquet if is_parquet(shard.file.name) else examine_shard
            return examine(shard, *self._settings, self._patience)
        rows = self._parts.pieces[piece]
        return examine_files(
            Path(self._root), self._parts.files, rows, *self._settings, self._patience
        )


@contextmanager
def _helpers(
    root: Path | str, folder: Path, count: int, max_pixels: int, exif_orientation: bool
) -> Generator[None, None, None]:
    """Run helper processes; they end with the block, or with this process."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        try:
            for number in range(1, count + 1):
                share = number, count + 1
                facts = [os.fspath(root), os.fspath(folder), *share, max_pixels, exif_orientation]
                started.append(
                    subprocess.Popen(
                        [sys.executable, "-P", "-m", "dataloading.index_build", json.dumps(facts)],
                        stdin=subprocess.PIPE,
                        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    )
                )
        except OSError as error:  # no more processes or memory: this process does their work
            text = "%d of %d helper processes were started (%s)"
            logger.warning(text, len(started), count, error.strerror)
        yield
        for helper in started:
            helper.wait()
    finally:
        for helper in started:
            helper.kill()
            helper.wait()
            if helper.stdin is not None:
                helper.stdin.close()


def main() -> None:
    """Help a build with the arguments in JSON from the command line; end when stdin closes."""
    import signal

    def end_with_parent() -> None:
        os.read(0, 1)  # a lock of sys.stdin would be held when this process ends
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format="[index helper] %(message)s")
    root, folder, number, count, max_pixels, exif_orientation = json.loads(sys.argv[1])
    with contextlib.suppress(ReadError):  # the builder examines missing pieces and reports it
        help_build(as_root(root), Path(folder), (number, count), max_pixels, exif_orientation)


if __name__ == "__main__":
    main()
