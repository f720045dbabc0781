"""Write a data set as shuffled tars: the same bytes in a random order, proved by reading them back.

What a tar holds is a pure function of the plan, so that a pack which was stopped anywhere goes on
with the next tar and ends as it would have undisturbed. A tar counts when ``pack.json`` names it:
it was written under another name, synced, read back and only then given its own.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dataloading.check import Fault, Told, in_order
from dataloading.errors import DataError
from dataloading.files import atomic_path, sync
from dataloading.index import Index, build_index
from dataloading.order import sample_ids
from dataloading.packed_tar import Sample, fault_of, write_samples
from dataloading.patience import PATIENCE_S
from dataloading.reading import Reader, UndecodableError, start_threads

logger = logging.getLogger(__name__)

PLAN = "pack.json"
_LOCK = ".pack.lock"
_FORMAT = 1


@dataclass
class Plan:
    """What ``pack.json`` holds; all but ``done`` decide what is written.

    Attributes:
        index: digest of the samples' index.
        labels: digest of their labels, which the index's does not cover.
        seed: of the order.
        shards: number of tars.
        left_out: samples that are not packed.
        done: for each finished tar the digest of its samples.
    """

    index: str
    labels: str
    seed: int
    shards: int
    left_out: list[Fault]
    done: dict[str, str] = field(default_factory=dict[str, str])


class Pack:
    """A folder into which one data set is packed.

    Args:
        index: the samples.
        out: the folder; made if it does not exist.
        seed: of the order.
        shard_bytes: bytes of pictures a tar, about.
        patience_s: how long a read that fails is tried again, seconds.
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

    @contextmanager
    def held(self) -> Generator[None, None, None]:
        """Keep every other pack out of the folder.

        Raises:
            DataError: if another one is at work, or the folder cannot be written.
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

    def begun(self) -> Plan | None:
        """Return the plan that an earlier start left; ``None`` if the folder is empty.

        Raises:
            DataError: if the plan is another one, or something else is in the folder.
        """
        path = self._out / PLAN
        try:
            text = path.read_text(encoding="ascii")
        except FileNotFoundError:
            others = [name for name in sorted(os.listdir(self._out)) if not name.startswith(".")]
            if others:
                raise DataError(
                    f"{self._out}: holds {others[0]} and no {PLAN}; name an empty or a new folder"
                ) from None
            return None
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            facts: dict[str, Any] = json.loads(text)
            if facts.pop("format") != _FORMAT:
                raise ValueError("another format")
            facts["left_out"] = [Fault(*fault) for fault in facts["left_out"]]
            facts["done"] = dict(facts["done"])
            plan = Plan(**facts)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: cannot be understood ({error}); name an empty or a new folder"
            ) from error
        wanted = self._plan(plan.left_out)
        for name, what in (
            ("index", "other images (index digest)"),
            ("labels", "other labels (digest)"),
            ("seed", "another seed"),
            ("shards", "another number of tars"),
        ):
            there, here = getattr(plan, name), getattr(wanted, name)
            if there != here:
                raise DataError(
                    f"{path}: was begun with {what}: {there}, now {here}; "
                    "use the same arguments and data, or name an empty or a new folder"
                )
        return plan

    def begin(self, left_out: Sequence[Fault]) -> Plan:
        """Decide what is written.

        Args:
            left_out: samples that are not packed.

        Raises:
            DataError: if a label cannot be packed, nothing is left, or the folder cannot be
                written.
        """
        for label in self._index.labels:
            if not label or label != label.strip():
                raise DataError(
                    f"{self._index.root}: the label {label!r} begins or ends with a space, which "
                    ".cls members cannot keep; rename the folder"
                )
        if len(left_out) == len(self._index):
            raise DataError(f"{self._index.root}: no image can be decoded; nothing is packed")
        plan = self._plan(left_out)
        self._save(plan)
        return plan

    def write(self, plan: Plan, *, threads: int, max_pixels: int, tell: Told) -> None:
        """Write and verify what is missing; verify what is there.

        Args:
            plan: from ``begun`` or ``begin``.
            threads: reading threads.
            max_pixels: as for the index.
            tell: called after every few samples.

        Raises:
            DataError: if the source does not give a sample, or the folder does not take or give
                back what is written.
        """
        for draft in self._out.glob(".*.tmp"):  # of a pack that was killed
            draft.unlink()
        bad = [fault.sample for fault in plan.left_out]
        rows = np.delete(np.arange(len(self._index), dtype=np.int64), bad)
        reader = Reader(self._index, self._patience_s)
        pool = start_threads(threads)
        try:
            for shard in range(plan.shards):
                first, last = (len(rows) * k // plan.shards for k in (shard, shard + 1))
                name = f"train-{shard:06d}.tar"
                done = plan.done.get(name)
                fault = "it is not finished"
                if done is not None:
                    fault = fault_of(self._out / name, done, last - first, max_pixels)
                    if fault is not None:
                        logger.warning("%s: %s; it is written again", self._out / name, fault)
                if fault is not None:
                    ids, _ = sample_ids(len(rows), plan.seed, np.arange(first, last))
                    chosen = zip(range(first, last), rows[ids].tolist(), strict=True)
                    samples = in_order(pool, threads, self._reading(reader), chosen)
                    plan.done[name] = self._write(name, samples, first, last, max_pixels, tell)
                    self._save(plan)
                tell(last)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            reader.close()

    def read_back(self, plan: Plan, max_pixels: int) -> Index:
        """Index the folder as a run would.

        Raises:
            DataError: if it does not hold what was packed and nothing else.
        """
        packed = build_index(self._out, "webdataset", max_pixels)
        expected = len(self._index) - len(plan.left_out)
        if len(packed) != expected or len(packed.shards) != plan.shards:
            raise DataError(
                f"{self._out}: holds {len(packed)} images in {len(packed.shards)} tars, {expected} "
                f"in {plan.shards} were packed; take away what is not of this pack"
            )
        return packed

    def _plan(self, left_out: Sequence[Fault]) -> Plan:
        labels = hashlib.sha256(json.dumps(self._index.labels).encode("ascii"))
        labels.update(self._index.entries["label"].tobytes())
        shards = min(self._shards, len(self._index) - len(left_out))
        return Plan(self._index.digest, labels.hexdigest(), self._seed, shards, list(left_out))

    def _save(self, plan: Plan) -> None:
        text = json.dumps({"format": _FORMAT, **asdict(plan)}, indent=1)
        self._publish(PLAN, lambda file: file.write(text.encode("ascii")))

    def _publish(
        self,
        name: str,
        fill: Callable[[BinaryIO], object],
        approve: Callable[[Path], None] | None = None,
    ) -> None:
        """Write a file under another name, sync it, and rename it once it is approved."""
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
        labels = [label.encode("utf-8", "surrogateescape") for label in self._index.labels]

        def read(chosen: tuple[int, int]) -> Sample:
            position, sample = chosen
            try:
                data = reader.read(sample)
            except UndecodableError as error:
                raise DataError(
                    f"{self._index.root}: {self._index.names[sample]} is not what was "
                    f"indexed any more ({error}); restore it and start again"
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
        tell: Told,
    ) -> str:
        """Write one tar; returns the digest of its samples, as the source gave them."""
        total = hashlib.sha256()

        def told() -> Iterator[Sample]:
            for done, sample in enumerate(samples, start=first):
                tell(done)
                yield sample

        def fill(file: BinaryIO) -> None:
            write_samples(file, told(), total)

        def approve(draft: Path) -> None:
            fault = fault_of(draft, total.hexdigest(), last - first, max_pixels)
            if fault is not None:
                raise DataError(
                    f"{self._out / name}: what was written does not read back ({fault}); do not "
                    "trust this storage, and name a folder on another"
                )

        self._publish(name, fill, approve)
        return total.hexdigest()

    def _unwritable(self, error: OSError) -> DataError:
        done = len(list(self._out.glob("train-*.tar")))
        more = self._bytes * (self._shards - done) / self._shards / 1e6
        return DataError(
            f"{self._out}: cannot be written ({error.strerror}); {done} of {self._shards} tars are "
            f"there, the others need about {more:.0f} MB. Make room, or make it writable, and "
            "start the same command again"
        )
