"""Write a data set as shuffled tars: the same bytes in a random order, verified by reading back.

The content of a tar is a pure function of ``pack.json``, so that an interrupted pack continues with
the next tar and ends with the same files. A tar is finished when ``pack.json`` names it: each tar
is written to a draft, synced, read back and only then renamed.

Images of Parquet files are first copied in their order, into a file that is deleted at the end.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dataloading.check import Fault, ReportDone, map_in_order
from dataloading.entries import UNREADABLE, encode_name
from dataloading.errors import DataError, ReadError
from dataloading.files import atomic_path, sync
from dataloading.index import Index, build_index
from dataloading.order import sample_ids
from dataloading.packed_tar import Sample, find_difference, write_samples
from dataloading.patience import PATIENCE_S
from dataloading.reading import Reader, UndecodableError, start_threads
from dataloading.webdataset import MAX_CLASS, decode_class

logger = logging.getLogger(__name__)

RECORD = "pack.json"
_LOCK = ".pack.lock"
_COPY = ".images-"
_FORMAT = 2


@dataclass
class PackRecord:
    """Content of ``pack.json``; all fields but ``done`` decide what is written.

    Attributes:
        index: digest of the samples' index.
        labels: digest of their labels, which the index's does not cover.
        seed: of the order.
        shards: number of tars.
        excluded: samples that are not packed.
        done: for each finished tar the digest of its samples.
    """

    index: str
    labels: str
    seed: int
    shards: int
    excluded: list[Fault]
    done: dict[str, str] = field(default_factory=dict[str, str])


class Pack:
    """A folder into which one data set is packed.

    Args:
        index: the samples.
        out: the folder; made if it does not exist.
        seed: of the order.
        shard_bytes: approximate image bytes per tar.
        patience_s: seconds for which a failed read is retried.

    Raises:
        DataError: if a label cannot be packed.
    """

    def __init__(
        self,
        index: Index,
        out: Path,
        *,
        seed: int,
        shard_bytes: int,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._index, self._out, self._seed = index, out, seed
        self._patience_s = patience_s
        self._bytes = int(index.entries["size"].sum(dtype=np.int64))
        self._shards = -(-self._bytes // shard_bytes)
        labels: NDArray[np.int32] = index.entries["label"]
        for row in np.unique(labels[labels >= 0]):
            label = index.labels[int(row)]
            text = encode_name(label)
            if not 0 < len(text) <= MAX_CLASS or decode_class(text) != label:
                raise DataError(
                    f"{index.root}: the label {label[:80]!r} cannot be packed: a .cls member holds "
                    f"a text of at most {MAX_CLASS} bytes without spaces or a byte-order mark at "
                    "its ends; rename it"
                )

    @contextmanager
    def locked(self) -> Generator[None, None, None]:
        """Lock the folder against other packs.

        Raises:
            DataError: if another pack is in progress, or the folder cannot be written.
        """
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._out / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{self._out}: another pack is being written there; wait for it, or name another "
                "folder"
            ) from error
        except OSError as error:
            raise DataError(
                f"{self._out}: cannot be locked ({error.strerror}); name a folder whose file "
                "system has flock"
            ) from error
        else:
            yield
        finally:
            os.close(lock)

    def load_record(self) -> PackRecord | None:
        """Return the record of an interrupted pack; ``None`` if the folder is empty.

        Raises:
            DataError: if the record does not fit, or the folder holds something else.
        """
        path = self._out / RECORD
        try:
            text = path.read_text(encoding="ascii")
        except FileNotFoundError:
            others = [name for name in sorted(os.listdir(self._out)) if not name.startswith(".")]
            if others:
                raise DataError(
                    f"{self._out}: holds {others[0]} and no {RECORD}; name an empty or a new folder"
                ) from None
            return None
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            facts: dict[str, Any] = json.loads(text)
            if facts.pop("format") != _FORMAT:
                raise ValueError("another format")
            facts["excluded"] = [Fault(*fault) for fault in facts["excluded"]]
            facts["done"] = dict(facts["done"])
            record = PackRecord(**facts)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: cannot be understood ({error}); name an empty or a new folder"
            ) from error
        wanted = self._make_record(record.excluded)
        for name, what in (
            ("index", "other images (index digest)"),
            ("labels", "other labels (digest)"),
            ("seed", "another seed"),
            ("shards", "another number of tars"),
        ):
            there, here = getattr(record, name), getattr(wanted, name)
            if there != here:
                raise DataError(
                    f"{path}: was begun with {what}: {there}, now {here}; "
                    "use the same arguments and data, or name an empty or a new folder"
                )
        return record

    def create_record(self, excluded: Sequence[Fault]) -> PackRecord:
        """Write the record of a new pack.

        Raises:
            DataError: if nothing is left, or the folder cannot be written.
            ReadError: if storage did not return a sample, which the pack would then lack.
        """
        unread = next((one for one in excluded if one.reason.startswith(UNREADABLE)), None)
        if unread is not None:
            raise ReadError(
                f"{self._index.root}: {unread.name} {unread.reason}; nothing is packed without it: "
                "make it readable, or remove it, and launch the same command again"
            )
        if len(excluded) == len(self._index):
            raise DataError(f"{self._index.root}: no image can be decoded; nothing is packed")
        record = self._make_record(excluded)
        self._save(record)
        return record

    def write(
        self, record: PackRecord, *, threads: int, max_pixels: int, report_done: ReportDone
    ) -> None:
        """Write and verify missing tars; verify finished tars.

        ``report_done`` is called after every few samples with the number of packed samples.

        Raises:
            DataError: if the source does not return a sample, or the folder cannot be written or
                does not return what was written.
        """
        for name in ("train-*.tar", RECORD, f"{_COPY}*"):
            for draft in self._out.glob(f".{name}.*.tmp"):  # of a pack that was killed
                draft.unlink()
        bad = [fault.sample for fault in record.excluded]
        rows = np.delete(np.arange(len(self._index), dtype=np.int64), bad)
        reader: Reader | None = None
        pool = start_threads(threads)
        try:
            for shard in range(record.shards):
                first, last = (len(rows) * k // record.shards for k in (shard, shard + 1))
                name = f"train-{shard:06d}.tar"
                done = record.done.get(name)
                fault = "it is not finished"
                if done is not None:
                    fault = find_difference(self._out / name, done, last - first, max_pixels)
                    if fault is not None:
                        logger.warning("%s: %s; it is written again", self._out / name, fault)
                if fault is not None:
                    if reader is None:
                        index = self._index
                        if index.source == "parquet":
                            index = self._copy_images(rows, pool, threads)
                        reader = Reader(index, self._patience_s)
                    ids, _ = sample_ids(len(rows), record.seed, np.arange(first, last))
                    chosen = zip(range(first, last), rows[ids].tolist(), strict=True)
                    samples = map_in_order(pool, threads, self._reading(reader), chosen)
                    record.done[name] = self._write(
                        name, samples, first, last, max_pixels, report_done
                    )
                    self._save(record)
                report_done(last)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            if reader is not None:
                reader.close()
        for copy in self._out.glob(f"{_COPY}*"):
            copy.unlink()

    def verify_index(
        self, record: PackRecord, max_pixels: int, exif_orientation: bool = True
    ) -> Index:
        """Index the folder as a run would; settings are those of ``build_index``.

        Raises:
            DataError: if the folder does not hold exactly the packed samples.
        """
        packed = build_index(self._out, "webdataset", max_pixels, exif_orientation)
        expected = len(self._index) - len(record.excluded)
        if len(packed) != expected or len(packed.shards) != record.shards:
            raise DataError(
                f"{self._out}: holds {len(packed)} images in {len(packed.shards)} tars, {expected} "
                f"in {record.shards} were packed; remove what this pack did not write"
            )
        return packed

    def _copy_images(
        self, rows: NDArray[np.int64], pool: ThreadPoolExecutor, threads: int
    ) -> Index:
        """Copy the images into one file, in the order of the index; return an index of the copy.

        Each row group is then decoded once; in the order of a pack, once per image.
        """
        name = f"{_COPY}{hashlib.sha256(self._index.digest.encode() + rows.tobytes()).hexdigest()}"
        for other in self._out.glob(f"{_COPY}*"):
            if other.name != name:
                other.unlink()
        entries = self._index.entries.copy()
        ends = np.cumsum(entries["size"][rows], dtype=np.uint64)
        entries["shard"] = 0
        entries["offset"][rows] = ends - entries["size"][rows]
        if not (self._out / name).exists():
            text = "%s: the images are copied there first, %.1f GB in the order of the files"
            logger.info(text, self._out, int(ends[-1]) / 1e9)
            reader = Reader(self._index, self._patience_s)
            chosen = ((0, row) for row in rows.tolist())
            samples = map_in_order(pool, threads, self._reading(reader), chosen)
            try:
                self._publish(name, lambda file: file.writelines(one.data for one in samples))
            finally:
                reader.close()
        return replace(
            self._index, source="webdataset", entries=entries, shards=(self._out / name,)
        )

    def _make_record(self, excluded: Sequence[Fault]) -> PackRecord:
        shards = min(self._shards, len(self._index) - len(excluded))
        return PackRecord(
            self._index.digest, self._index.labels_digest(), self._seed, shards, list(excluded)
        )

    def _save(self, record: PackRecord) -> None:
        text = json.dumps({"format": _FORMAT, **asdict(record)}, indent=1)
        self._publish(RECORD, lambda file: file.write(text.encode("ascii")))

    def _publish(
        self,
        name: str,
        fill: Callable[[BinaryIO], object],
        approve: Callable[[Path], None] | None = None,
    ) -> None:
        """Write a file to a draft, sync it, and rename it after ``approve``."""
        try:
            with atomic_path(self._out / name) as draft:
                with draft.open("wb") as file:
                    fill(file)
                    file.flush()
                    os.fsync(file.fileno())
                if approve is not None:
                    approve(draft)
            sync(self._out)
        except OSError as error:
            raise self._unwritable(error) from error

    def _reading(self, reader: Reader) -> Callable[[tuple[int, int]], Sample]:
        labels = [encode_name(label) for label in self._index.labels]

        def read(chosen: tuple[int, int]) -> Sample:
            position, sample = chosen
            try:
                data = reader.read(sample)
            except UndecodableError as error:
                raise DataError(
                    f"{self._index.root}: {self._index.names[sample]} is no longer what was "
                    f"indexed ({error}); restore it and launch again"
                ) from error
            label = int(self._index.entries["label"][sample])
            return Sample(f"{position:09d}", labels[label] if label >= 0 else b"", data)

        return read

    def _write(
        self,
        name: str,
        samples: Iterator[Sample],
        first: int,
        last: int,
        max_pixels: int,
        report_done: ReportDone,
    ) -> str:
        """Write one tar; return the digest of the source's samples."""
        total = hashlib.sha256()

        def count_samples() -> Iterator[Sample]:
            for done, sample in enumerate(samples, start=first):
                report_done(done)
                yield sample

        def approve(draft: Path) -> None:
            fault = find_difference(draft, total.hexdigest(), last - first, max_pixels)
            if fault is not None:
                raise DataError(
                    f"{self._out / name}: what was written does not read back ({fault}); do not "
                    "trust this storage, and name a folder on another"
                )

        self._publish(name, lambda file: write_samples(file, count_samples(), total), approve)
        return total.hexdigest()

    def _unwritable(self, error: OSError) -> DataError:
        done = len(list(self._out.glob("train-*.tar")))
        more = self._bytes * (self._shards - done) / self._shards / 1e6
        return DataError(
            f"{self._out}: cannot be written ({error.strerror}); {done} of {self._shards} tars are "
            f"there, the others need about {more:.0f} MB. Make room, or make it writable, and "
            "launch the same command again"
        )
