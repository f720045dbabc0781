"""Report on a data set, as text and as JSON."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dataloading.check import Fault
from dataloading.entries import count_turned
from dataloading.index import UNITS, Index
from dataloading.mixing import Mixing, class_mixing, expected_labels
from dataloading.parquet_index import DAMAGED, LARGEST_GROUP
from dataloading.passed_over import format_count, format_passed, lost_images
from dataloading.values import Survey

_NAMED = 3  # files named for each reason
_LISTED = 20  # undecodable images listed
_LOST = ("cut short", "rest of this tar", "end of the archive", DAMAGED)
"""Parts of reasons that imply the loss of further images."""


class Range(NamedTuple):
    """Distribution of a quantity."""

    min: int
    median: int
    p95: int
    max: int


@dataclass(frozen=True)
class DataReport:
    """Properties and faults of a data set.

    Attributes:
        index: the images, from their headers.
        undecodable: rows of the index that cannot be decoded.
        max_bad_fraction: fraction of bad images up to which a run may start.
        sizes: distribution of width, height, pixels and bytes.
        images_per_label: min, median, max; ``None`` without labels.
        unlabelled: images without a label.
        labels_per_tar: min, median, max; ``None`` without tars or labelled images.
        labels_expected: labels per tar of mean size in a full shuffle.
        mixing: whether neighbours have many labels; ``None``: unknown.
        survey: suspect values and duplicates; ``None``: the images were decoded earlier.
    """

    index: Index
    undecodable: Sequence[Fault]
    max_bad_fraction: float
    sizes: dict[str, Range]
    images_per_label: tuple[int, int, int] | None
    unlabelled: int
    labels_per_tar: tuple[int, int, int] | None
    labels_expected: float | None
    mixing: Mixing | None
    survey: Survey | None

    @property
    def bad(self) -> int:
        """Images that no run uses: excluded from the index, or undecodable."""
        return len(self.index.unused_images()) + len(self.undecodable)

    @property
    def found(self) -> int:
        """Images that were found, whether or not a run uses them."""
        return len(self.index) + len(self.index.unused_images())

    @property
    def bad_fraction(self) -> float:
        """Fraction of bad images among all image files."""
        return self.bad / self.found

    @property
    def turned(self) -> tuple[int, int]:
        """Images that are turned upright, and images whose EXIF orientation is not applied."""
        return count_turned(self.index.entries["flags"])

    @property
    def lost(self) -> list[str]:
        """Damaged tars or row groups, according to the index."""
        return [
            f"{name}: {reason}"
            for name, reason in self.index.excluded
            if any(text in reason for text in _LOST)
        ]

    def _survey_dict(self) -> dict[str, Any]:
        if self.survey is None:
            return {}
        names = self.index.names
        return {
            "suspect": [
                Fault(row, names[row], reason)._asdict() for row, reason in self.survey.suspect
            ],
            "duplicates": [[names[row] for row in group] for group in self.survey.duplicates],
            "scaled": self.survey.scaled,
        }

    @property
    def is_usable(self) -> bool:
        """Whether a run may start."""
        return (
            self.bad_fraction <= self.max_bad_fraction
            and len(self.undecodable) < len(self.index)
            and not self.lost
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON; every bad image is listed."""
        mixing = self.mixing
        return {
            "path": str(self.index.root),
            "source": self.index.source,
            "digest": self.index.digest,
            "images": len(self.index),
            "tars": len(self.index.shards),
            "row_group": self.index.row_group,
            "excluded": _to_dicts(self.index.unused_images()),
            "label_faults": _to_dicts(self.index.label_faults()),
            "passed_over": [passed._asdict() for passed in self.index.passed_over],
            "undecodable": [fault._asdict() for fault in self.undecodable],
            **self._survey_dict(),
            "turned": self.turned[0],
            "orientation_not_applied": self.turned[1],
            "bad_fraction": self.bad_fraction,
            "max_bad_fraction": self.max_bad_fraction,
            "damaged_tars": self.lost,
            "sizes": {name: extent._asdict() for name, extent in self.sizes.items()},
            "labels": len(self.index.labels),
            "images_per_label": self.images_per_label,
            "unlabelled": self.unlabelled,
            "labels_per_tar": self.labels_per_tar,
            "labels_per_tar_in_a_full_shuffle": self.labels_expected,
            "mixing": mixing and {**mixing._asdict(), "is_sorted": mixing.is_sorted},
            "is_usable": self.is_usable,
        }


def summarise_data(
    index: Index,
    undecodable: Sequence[Fault],
    max_bad_fraction: float,
    survey: Survey | None = None,
) -> DataReport:
    """Summarise the index and the findings of the decoder."""
    rows = index.entries
    labels: NDArray[np.int32] = rows["label"]
    known = labels >= 0
    per_label = np.bincount(labels[known], minlength=len(index.labels))
    per_tar, expected = None, None
    if len(index.shards) > 1 and len(index.labels) > 1 and known.any():
        pairs = np.unique(np.stack([rows["shard"][known], labels[known]]).astype(np.int64), axis=1)
        counts = np.bincount(pairs[0], minlength=len(index.shards))
        per_tar = (int(counts.min()), int(np.median(counts)), int(counts.max()))
        expected = expected_labels(per_label, max(1, int(known.sum()) // len(index.shards)))
    pixels = rows["width"].astype(np.int64) * rows["height"]
    sizes = {"width": rows["width"], "height": rows["height"], "pixels": pixels}
    return DataReport(
        index,
        undecodable,
        max_bad_fraction,
        {name: measure_range(values) for name, values in {**sizes, "bytes": rows["size"]}.items()},
        (int(per_label.min()), int(np.median(per_label)), int(per_label.max()))
        if len(per_label)
        else None,
        int((~known).sum()),
        per_tar,
        expected,
        class_mixing(labels),
        survey,
    )


def measure_range(values: NDArray[Any]) -> Range:
    """Return minimum, median, 95th percentile and maximum of integers."""
    return Range(*np.quantile(values, (0, 0.5, 0.95, 1), method="nearest").astype(int).tolist())


def render_data_report(report: DataReport) -> str:
    """Return the report as text."""
    index = report.index
    file = "Parquet file" if index.source == "parquet" else "tar"
    kind = format_count(len(index.shards), file) if index.shards else "folder"
    images = format_count(len(index), "image")
    lines = [f"{index.root}: {kind}, {images}, index digest {index.digest[:12]}", ""]
    lines += _fault_lines(report)
    lines += ["", f"{'':8}{'min':>12}{'median':>12}{'95 %':>12}{'max':>12}"]
    for name, extent in report.sizes.items():
        lines.append(f"{name:8}" + "".join(f"{value:12,}" for value in extent))
    turned, as_stored = report.turned
    text = f"orientation: {turned} of {images} turned upright (EXIF)"
    if as_stored:
        text += f"; the EXIF orientation of {format_count(as_stored, 'image')} is not applied"
    lines += ["", text]
    if report.images_per_label is None:
        lines.append("labels: none")
    else:
        low, middle, high = report.images_per_label
        lines.append(
            f"labels: {len(index.labels)}; images per label: {low} to {high}, median {middle}; "
            f"without a label: {report.unlabelled}"
        )
    if report.labels_per_tar is not None:
        low, middle, high = report.labels_per_tar
        file = "file" if index.source == "parquet" else "tar"
        lines.append(
            f"labels per {file}: {low} to {high}, median {middle}; {report.labels_expected:.1f} in "
            "a full shuffle"
        )
    lines.append(f"order: {report.mixing or 'unknown without labels'}")
    if index.row_group is not None:
        size, where = index.row_group
        lines.append(f"row groups: at most {size / 2**20:.1f} MiB of images (from {where} on)")
        full = "refused, pack the images first" if size > LARGEST_GROUP else "possible"
        lines.append(f"data.shuffle=full: {full}")
    lines.append(f"data.shuffle=window: {_window_shuffle(report)}")
    lines += ["", f"verdict: {_verdict(report)}"]
    return "\n".join(lines)


def _fault_lines(report: DataReport) -> list[str]:
    index = report.index
    unused, unlabelled = index.unused_images(), index.label_faults()
    lines = [f"excluded by their headers: {len(unused)}", *_grouped(unused)]
    if unlabelled:
        lines += [f"warning: labels that cannot be used: {len(unlabelled)}", *_grouped(unlabelled)]
    lines.append(format_passed_over(index) or "passed over: none")
    lines.append(f"undecodable: {len(report.undecodable)}")
    lines += [f"  {fault.name}: {fault.reason}" for fault in report.undecodable[:_LISTED]]
    if len(report.undecodable) > _LISTED:
        lines.append(f"  and {len(report.undecodable) - _LISTED} more; --report lists them")
    if report.survey is None:
        text = "suspect values, exact duplicates: named when this pack began, not searched again"
        return [*lines, text]
    return lines + _survey_lines(index, report.survey)


def _to_dicts(reasons: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"name": name, "reason": reason} for name, reason in reasons]


def _grouped(reasons: Sequence[tuple[str, str]]) -> list[str]:
    """One line per reason, numbers aside, from (name, reason)."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons:
        groups.setdefault(re.sub(r"\d+", "N", reason), []).append(f"{name} ({reason})")
    lines: list[str] = []
    for group in sorted(groups.values(), key=len, reverse=True):
        more = f" and {len(group) - _NAMED} more" if len(group) > _NAMED else ""
        lines.append(f"  {len(group)}: {', '.join(group[:_NAMED])}{more}")
    return lines


def _survey_lines(index: Index, survey: Survey) -> list[str]:
    """Warn of suspect values and duplicates, and state the rule of scaling."""
    suspect, groups = survey.suspect, survey.duplicates
    lines = [f"{'warning: ' if suspect else ''}suspect values: {len(suspect)}"]
    lines += _grouped([(index.names[row], reason) for row, reason in suspect])
    repeated = sum(len(group) - 1 for group in groups)
    lines.append(f"{'warning: ' if groups else ''}exact duplicates: {repeated}")
    for group in groups[:_LISTED]:
        more = f" and {len(group) - _NAMED} more" if len(group) > _NAMED else ""
        lines.append(f"  {' = '.join(index.names[row] for row in group[:_NAMED])}{more}")
    if len(groups) > _LISTED:
        more = format_count(len(groups) - _LISTED, "more group")
        lines.append(f"  and {more}; --report lists them")
    if survey.scaled:
        lines.append(
            f"scaled to 8 bits: {survey.scaled}; of b bits, 0 becomes 0 and 2^b - 1 becomes 255"
        )
    return lines


def format_passed_over(index: Index) -> str:
    """Format the files that the index passes over, by extension; empty if there are none."""
    return format_passed(index.passed_over, UNITS[index.source])


def _window_shuffle(report: DataReport) -> str:
    if report.index.row_group is not None and report.index.row_group[0] > LARGEST_GROUP:
        return "refused, pack the images first"
    if report.mixing is None:
        return "safe only if the images were shuffled when they were stored"
    return "refused, pack the images first" if report.mixing.is_sorted else "safe"


def _verdict(report: DataReport) -> str:
    whole = format_count(report.found, "image")
    bad = f"{report.bad} of {whole} {'is' if report.bad == 1 else 'are'} bad"
    bad += f" ({report.bad_fraction:.2%}, at most {report.max_bad_fraction:.2%} may be)"
    lost = lost_images(report.index.passed_over)
    bad += f"; not taken as images: {format_count(lost, 'more file')}" if lost else ""
    if report.lost:
        what = format_count(len(report.lost), "damaged row group")
        if report.index.source == "webdataset":
            what = f"{format_count(len(report.lost), 'tar')} damaged or cut short"
        return f"unusable: {what}; {bad}"
    if len(report.undecodable) == len(report.index):
        return "unusable: no image can be decoded"
    return f"{'usable' if report.is_usable else 'unusable'}: {bad}"
