"""The index of Parquet files: every row, header and label of its image, the largest row group."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from dataloading.entries import ENTRY, NO_LABEL, depends_on_machine, examine
from dataloading.errors import DataError, UndecodableError
from dataloading.headers import header_of_bytes
from dataloading.order import Shuffle
from dataloading.parquet import batches, read_footer, unpack
from dataloading.parts import Part
from dataloading.passed_over import Counts, count_passed
from dataloading.patience import LASTING, Patience
from dataloading.shard_names import place
from dataloading.shards import Shard

LARGEST_GROUP = 32 << 20
"""Most image bytes of a row group where images are shuffled: each image costs the decoding of up to
its row group. A window of the order is much larger than what is kept decoded, so that
``data.shuffle=window`` saves reads of storage only."""
DAMAGED = "from here on cannot be decoded"
"""Part of the reason for lost rows of a row group."""


def examine_parquet(
    shard: Shard, max_pixels: int, exif_orientation: bool, patience: Patience
) -> Part:
    """Read a whole file and the headers of its images; see ``webdataset.examine_shard``.

    Memory grows with the size of pages, and not of row groups.

    Returns:
        Rows whose labels are rows of the fact ``classes``, whose shard is 0 and whose offset is the
        row of the file. ``is_named``: the classes are those of a ClassLabel, in its order.
        ``row_group`` has the image bytes of the largest row group and its first row.

    Raises:
        DataError: if the file is not a Parquet file, has no image column or cannot be read.
        ReadError: if storage fails for longer than reads are retried.
    """
    path = Path(str(shard.path))

    def examined() -> Part:
        try:
            return _examine_file(path, shard.file.name, max_pixels, exif_orientation)
        except OSError as error:
            if error.errno not in LASTING:
                raise
            raise DataError(
                f"{path}: this file cannot be read ({error.strerror}); make it readable"
            ) from error

    return patience.retry(examined, str(path))


def require_small_groups(
    root: Path | str, row_group: tuple[int, str] | None, shuffle: Shuffle
) -> None:
    """Refuse row groups that are too large for random access; ``"none"`` allows any.

    Args:
        root: the data set.
        row_group: ``Index.row_group``.
        shuffle: order in which the images are read.

    Raises:
        DataError: names the row group and the command that rewrites the data set.
    """
    if shuffle == "none" or row_group is None or row_group[0] <= LARGEST_GROUP:
        return
    size, where = row_group
    raise DataError(
        f"{root}: the row group that begins at {where} has {size / 2**20:.1f} MiB of images, and "
        f"every shuffled image costs the decoding of one; at most {LARGEST_GROUP >> 20} MiB are "
        f"read with data.shuffle={shuffle}. Write the images as tars (cmtmae check-data {root} "
        "--pack OUT, which reads row groups in order) and set data.path=OUT"
    )


def _examine_file(path: Path, name: str, max_pixels: int, exif_orientation: bool) -> Part:
    try:
        footer = read_footer(path)
    except UndecodableError as error:
        raise DataError(f"{path}: {error}; write or download it again") from error
    columns = footer.columns
    rows: list[tuple[int, int, int, int, int, int, int]] = []
    excluded: list[tuple[str, str]] = []
    passed: Counts = {}
    classes = _Classes(columns.names)
    largest = 0, 0
    for group, first in enumerate(footer.starts[:-1]):
        row, group_bytes = first, 0
        try:
            for batch in batches(path, footer, group, columns):
                for image, has_path, label in zip(*unpack(batch, columns), strict=True):
                    where = place(name, row)
                    number, fault = classes.number_of(label)
                    if fault is not None:
                        excluded.append((where, f"{fault}; {NO_LABEL}"))
                    if not image.is_valid:
                        count_passed(passed, "path" if has_path else "null", "", where)
                    else:
                        data: bytes = image.as_py()
                        group_bytes += len(data)
                        found = examine(
                            len(data),
                            functools.partial(header_of_bytes, data),
                            max_pixels,
                            exif_orientation,
                        )
                        if found.fault is None:
                            size = len(data), found.width, found.height
                            rows.append((0, row, *size, number, found.flags))
                        else:
                            excluded.append((where, found.fault))
                    row += 1
        except UndecodableError as error:
            lost = footer.starts[group + 1] - row
            excluded.append((place(name, row), f"{lost} rows {DAMAGED}: {error}"))
        largest = max(largest, (group_bytes, -first))
    facts: dict[str, Any] = {
        "classes": classes.texts,
        "is_named": columns.names is not None,
        "columns": f"images in {columns.image}, labels in {columns.label or 'none'}",
        "unread": [f"{path.name}: {column}" for column in columns.unread],
        "excluded": excluded,
        "is_final": not any(depends_on_machine(reason) for _, reason in excluded),
        "passed": list(passed.values()),
        "folders": [],
        "row_group": [largest[0], -largest[1]],
    }
    return Part(facts, np.array(rows, dtype=ENTRY))


class _Classes:
    """Numbers the labels of a file: by a ClassLabel's names, or by the texts that occur."""

    def __init__(self, names: tuple[str, ...] | None) -> None:
        self.texts = list(names or ())
        self._is_named = names is not None
        self._known: dict[str, int] = {}

    def number_of(self, label: Any) -> tuple[int, str | None]:
        """Return the row of ``texts`` (-1: no label), and what is wrong with the label."""
        if self._is_named:
            if label is None or label == -1:
                return -1, None
            if 0 <= label < len(self.texts):
                return label, None
            return -1, f"its label is {label}, of {len(self.texts)} classes"
        text = "" if label is None else str(label).strip()
        if not text:
            return -1, None
        if text not in self._known:
            self._known[text] = len(self.texts)
            self.texts.append(text)
        return self._known[text], None
