"""Images in Parquet files, as Hugging Face datasets writes them, read by row group with pyarrow.

pyarrow reads a row group in order only: a read decodes its row group from the first row to the row
that is requested, page by page. Files are read by positional reads and not mapped: a mapped file
that is cut short, or whose server fails, ends the process. Nothing here uses pyarrow's threads,
which do not survive a fork. ``parquet_index.py`` builds the index.
"""

import bisect
import importlib
import importlib.util
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dataloading.errors import DataError, UndecodableError
from dataloading.files import open_regular
from dataloading.headers import explain_other_file

_BATCH = 16  # rows that are decoded together
_BUFFER = 1 << 20  # bytes that are read together
_KEPT_BYTES = 64 << 20  # of decoded row groups, beside the row groups in use
_KEPT_GROUPS = 256  # each may have its file open
_BACK_BYTES = 256 << 20  # of one row group; larger ones are read in order
_FOOTERS = 512  # files whose footers are kept
_IMAGES = ("image", "img")
_LABELS = ("label", "labels", "class", "cls", "target")
_MAGIC = b"PAR1"


class Columns(NamedTuple):
    """Columns of a file that are used.

    Attributes:
        image: encoded images: binary, or a struct.
        fields: of the struct that are read, ``bytes`` and perhaps ``path``; none for binary.
        label: integers or texts; ``None``: none.
        names: of the classes, which integers index; ``None``: the values are the names.
        unread: columns named as labels are, of a type that is not read; only if there is no label.
    """

    image: str
    fields: tuple[str, ...]
    label: str | None
    names: tuple[str, ...] | None
    unread: tuple[str, ...]

    def leaves(self) -> list[str]:
        """Return the columns as pyarrow selects them."""
        images = [f"{self.image}.{field}" for field in self.fields] or [self.image]
        return images + ([] if self.label is None else [self.label])


class Footer(NamedTuple):
    """Content of the footer of a file.

    Attributes:
        stamp: size, time of modification and inode of the file.
        metadata: pyarrow's ``FileMetaData``.
        starts: first row of each row group, and the number of rows.
        columns: that are used.
    """

    stamp: tuple[int, int, int]
    metadata: Any
    starts: list[int]
    columns: Columns


def require_pyarrow(path: Path | str) -> None:
    """Refuse Parquet files where pyarrow is not installed.

    Raises:
        DataError: names the package to install.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(
            f"{path}: pyarrow is not installed, which reads Parquet files; install the extra "
            "parquet (pip install 'cmtmae-scale[parquet]')"
        )


def read_footer(path: Path) -> Footer:
    """Read the footer of a file, and choose its columns.

    Raises:
        DataError: if there is no image column, or the choice is ambiguous.
        UndecodableError: if it is not a Parquet file, or is damaged.
        OSError: if it cannot be read.
    """
    descriptor = open_regular(path)
    try:
        facts = os.fstat(descriptor)
        start = os.pread(descriptor, 256, 0)
    finally:
        os.close(descriptor)
    if not start.startswith(_MAGIC):
        raise UndecodableError(f"is not a Parquet file{explain_other_file(start)}")
    with _damage(), _arrow().OSFile(os.fsencode(path)) as file:
        metadata = _arrow_parquet().read_metadata(file)
        schema = metadata.schema.to_arrow_schema()
        counts = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    starts = [0, *np.cumsum(counts, dtype=np.int64).tolist()]
    stamp = facts.st_size, facts.st_mtime_ns, facts.st_ino
    return Footer(stamp, metadata, starts, find_columns(path, schema))


def find_columns(path: Path, schema: Any) -> Columns:
    """Choose the columns of images and labels from an Arrow schema.

    Images: the column that is an ``Image`` of Hugging Face datasets, else a struct with ``bytes``,
    else a binary column; of several the column named ``image`` or ``img``. Labels: the first
    ``ClassLabel``, else the first of ``label``, ``labels``, ``class``, ``cls`` and ``target`` that
    has integers or texts.

    Raises:
        DataError: if there is no image column, the choice is ambiguous, or two have one name.
    """
    features = _features(schema)
    by_feature: list[str] = []
    structs: list[str] = []
    binaries: list[str] = []
    for field in schema:
        has_bytes = _struct_child(field.type, "bytes") is not None
        if has_bytes or _is_binary(field.type):
            (structs if has_bytes else binaries).append(field.name)
            if features.get(field.name, {}).get("_type") == "Image":
                by_feature.append(field.name)
    found = by_feature or structs or binaries
    chosen = found[:1] if len(found) == 1 else [name for name in _IMAGES if name in found][:1]
    if not chosen:
        listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
        if found:
            problem = f"which of the columns {', '.join(found)} has the images is unknown"
            remedy = "name it image"
        else:
            problem = f"has no column of encoded images, but {listed}"
            remedy = "write one with datasets.Image, or of type binary"
        raise DataError(f"{path}: {problem}; {remedy}")
    image = chosen[0]
    label, names = _find_label(schema, features)
    for name in (image, *_LABELS):
        if schema.names.count(name) > 1:
            raise DataError(f"{path}: has several columns named {name}; give each its own name")
    kind = schema.field(image).type
    fields = tuple(name for name in ("bytes", "path") if _struct_child(kind, name) is not None)
    unread = [one for one in schema if label is None and one.name in _LABELS and one.name != image]
    return Columns(image, fields, label, names, tuple(f"{one.name} ({one.type})" for one in unread))


def _find_label(
    schema: Any, features: dict[str, dict[str, Any]]
) -> tuple[str | None, tuple[str, ...] | None]:
    for field in schema:
        feature = features.get(field.name, {})
        names = feature.get("names")
        if feature.get("_type") == "ClassLabel" and names and _is_integer(field.type):
            return field.name, tuple(map(str, names))
    for name in _LABELS:
        at = schema.get_field_index(name)
        if at >= 0 and (_is_integer(schema.field(at).type) or _is_text(schema.field(at).type)):
            return name, None
    return None, None


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return the features that Hugging Face datasets recorded; empty if there are none."""
    try:
        metadata: dict[bytes, bytes] = schema.metadata or {}
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {name: one for name, one in features.items() if isinstance(one, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


class ParquetSource:
    """Images of Parquet files; row groups are kept decoded up to 64 MiB, and those in use.

    Args:
        shards: the files.
        entries: rows of the index.

    Raises:
        DataError: if pyarrow is not installed.
    """

    def __init__(self, shards: Sequence[Path], entries: NDArray[np.void]) -> None:
        require_pyarrow(shards[0])
        self._shards = shards
        self._entries = entries
        self._lock = threading.Lock()
        self._footers: OrderedDict[int, Footer] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], _Group] = OrderedDict()

    def read(self, i: int) -> bytes:
        """Return the encoded image of row ``i``, as ``Source.read``.

        Raises:
            UndecodableError: if the file, or its row group, is damaged.
            OSError: if it cannot be read.
        """
        entry = self._entries[i]
        shard, row = int(entry["shard"]), int(entry["offset"])
        group = self._find_group(shard, row)
        if group is None:
            return b""
        data = group.read(row)
        self._drop_least_used()
        return data[: int(entry["size"]) + 1]

    def prefetch(self, rows: Sequence[int]) -> None:
        """Do nothing: rows that are read together share a decoded row group."""

    def close(self) -> None:
        """Drop what is decoded; no read may be in progress."""
        with self._lock:
            self._footers.clear()
            self._groups.clear()

    def _find_group(self, shard: int, row: int) -> "_Group | None":
        """Return the row group of a row; ``None`` if the file has fewer rows now."""
        with self._lock:
            footer = self._footers.get(shard)
            if footer is not None:
                self._footers.move_to_end(shard)
                key = shard, _group_of(footer, row)
                if key in self._groups:
                    self._groups.move_to_end(key)
                    return self._groups[key]
        path = self._shards[shard]
        facts = path.stat()
        stamp = facts.st_size, facts.st_mtime_ns, facts.st_ino
        if footer is None or footer.stamp != stamp:
            try:
                footer = read_footer(path)
            except DataError as error:
                raise UndecodableError("its file has other columns than when indexed") from error
        number = _group_of(footer, row)
        with self._lock:
            self._footers[shard] = footer
            if len(self._footers) > _FOOTERS:
                self._footers.popitem(last=False)
            if number >= len(footer.starts) - 1:
                return None
            return self._groups.setdefault((shard, number), _Group(path, footer, number))

    def _drop_least_used(self) -> None:
        with self._lock:
            kept = sum(group.kept_bytes for group in self._groups.values())
            while len(self._groups) > 1 and (
                kept > _KEPT_BYTES or len(self._groups) > _KEPT_GROUPS
            ):
                kept -= self._groups.popitem(last=False)[1].kept_bytes


class _Group:
    """A row group, decoded up to the last requested row; safe in threads."""

    def __init__(self, path: Path, footer: Footer, number: int) -> None:
        self.kept_bytes = 0
        self._path, self._footer, self._number = path, footer, number
        self._first = footer.starts[number]
        self._lock = threading.Lock()
        self._restart()

    def read(self, row: int) -> bytes:
        """Return the image of a row of the file; empty where the row has none.

        Raises:
            UndecodableError: if the row group is damaged before the end of the row.
            OSError: if it cannot be read.
        """
        with self._lock:
            try:
                if self._starts and row < self._starts[0]:
                    self._restart()
                while row >= self._end:
                    self._decode_more()
            except BaseException:
                self._restart()  # the next read opens the file again
                raise
            at = bisect.bisect_right(self._starts, row) - 1
            return self._arrays[at][row - self._starts[at]].as_py() or b""

    def _restart(self) -> None:
        columns = self._footer.columns
        columns = columns._replace(fields=columns.fields[:1], label=None)
        self._batches = batches(self._path, self._footer, self._number, columns)
        self._starts: list[int] = []
        self._arrays: list[Any] = []
        self._end = self._first
        self.kept_bytes = 0

    def _decode_more(self) -> None:
        array = _images(next(self._batches), self._footer.columns)
        self._starts.append(self._end)
        self._arrays.append(array)
        self._end += len(array)
        self.kept_bytes += array.nbytes
        if self._end == self._footer.starts[self._number + 1]:
            self._batches.close()  # and with it the file
        while self.kept_bytes > _BACK_BYTES and len(self._arrays) > 1:
            self.kept_bytes -= self._arrays.pop(0).nbytes
            del self._starts[0]


def _group_of(footer: Footer, row: int) -> int:
    """Return the row group of a row; the number of row groups if there is none."""
    return bisect.bisect_right(footer.starts, row) - 1


def batches(path: Path, footer: Footer, group: int, columns: Columns) -> Generator[Any, None, None]:
    """Yield the rows of a row group, a few at a time, as record batches of the columns.

    The number of rows is that in the footer.

    Raises:
        UndecodableError: if it is damaged.
        OSError: if it cannot be read.
    """
    with _damage(), _arrow().OSFile(os.fsencode(path)) as source:
        file = _arrow_parquet().ParquetFile(
            source,
            metadata=footer.metadata,
            buffer_size=_BUFFER,
            pre_buffer=False,  # which would read the whole row group, in pyarrow's threads
            page_checksum_verification=True,
        )
        decoded = file.iter_batches(
            _BATCH, row_groups=[group], columns=columns.leaves(), use_threads=False
        )
        left = footer.starts[group + 1] - footer.starts[group]
        for batch in decoded:
            left -= len(batch)
            if left < 0:
                break
            yield batch
        if left:
            raise UndecodableError("its row group has more or fewer rows than in its footer")


def unpack(batch: Any, columns: Columns) -> tuple[Any, list[bool], list[Any]]:
    """Return images, whether there are paths beside them, and labels of a batch."""
    image = batch.column(columns.image)
    paths = [False] * len(batch)
    if "path" in columns.fields:
        paths = _child(image, "path").is_valid().to_pylist()
    labels = [None] * len(batch)
    if columns.label is not None:
        labels = [_value(one) for one in _plain(batch.column(columns.label))]
    return _images(batch, columns), paths, labels


def _value(label: Any) -> Any:
    """Return an integer or text; bytes that are not UTF-8 are kept as in file names."""
    if not label.is_valid or not _is_text(label.type):
        return label.as_py()
    return label.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")


def _images(batch: Any, columns: Columns) -> Any:
    """Return the images of a batch, of a struct its bytes."""
    image = batch.column(columns.image)
    return _plain(_child(image, "bytes") if columns.fields else image)


def _plain(array: Any) -> Any:
    """Return the values of a column, which may be dictionary-encoded."""
    return array.dictionary_decode() if _arrow().types.is_dictionary(array.type) else array


def _child(array: Any, name: str) -> Any:
    """Return a field of a struct column, null where the struct is null."""
    return array.flatten()[array.type.get_field_index(name)]


@contextmanager
def _damage() -> Generator[None, None, None]:
    """Convert the errors of pyarrow for damaged files to ``UndecodableError``.

    pyarrow raises an ``OSError`` with an ``errno`` only where the system raised it.
    """
    damage = _arrow().ArrowException  # nothing can be imported while the interpreter exits
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        raise UndecodableError(_first_line(error)) from error
    except damage as error:
        if isinstance(error, MemoryError):
            raise
        raise UndecodableError(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:120] or type(error).__name__


def _struct_child(kind: Any, name: str) -> Any:
    """Return the type of a struct's binary or text child; ``None`` where there is none."""
    if not _arrow().types.is_struct(kind):
        return None
    at = kind.get_field_index(name)
    fits = _is_binary if name == "bytes" else _is_text
    return kind.field(at).type if at >= 0 and fits(kind.field(at).type) else None


def _is_binary(kind: Any) -> bool:
    types = _arrow().types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_text(kind: Any) -> bool:
    types = _arrow().types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_integer(kind: Any) -> bool:
    types = _arrow().types
    return types.is_integer(kind.value_type if types.is_dictionary(kind) else kind)


def _arrow() -> Any:
    return importlib.import_module("pyarrow")


def _arrow_parquet() -> Any:
    return importlib.import_module("pyarrow.parquet")
