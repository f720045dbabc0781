"""What was found out about a data set, as text and as JSON."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dataloading.check import Fault
from dataloading.index import Index
from dataloading.mixing import Mixing, class_mixing, expected_labels

_NAMED = 3  # files named for each reason
_LISTED = 20  # undecodable images listed
_LOST = ("cut short", "rest of this tar", "end of the archive")
"""Reasons for which an unknown number of images behind the place is lost."""


class Spread(NamedTuple):
    """Extent of a quantity."""

    min: int
    median: int
    p95: int
    max: int


@dataclass(frozen=True)
class Report:
    """A data set, looked through.

    Attributes:
        index: what its headers say.
        undecodable: rows of the index that cannot be decoded.
        max_bad_fraction: share of bad images up to which a run may start.
        sizes: spread of width, height, pixels and bytes.
        images_a_label: min, median, max; ``None`` without labels.
        unlabelled: images without a label.
        labels_a_tar: min, median, max; ``None`` without tars or labels.
        labels_expected: labels of a tar of mean size in a full shuffle.
        mixing: whether neighbours are of many labels; ``None``: cannot be said.
    """

    index: Index
    undecodable: Sequence[Fault]
    max_bad_fraction: float
    sizes: dict[str, Spread]
    images_a_label: tuple[int, int, int] | None
    unlabelled: int
    labels_a_tar: tuple[int, int, int] | None
    labels_expected: float | None
    mixing: Mixing | None

    @property
    def bad(self) -> int:
        """Images that no run will see: left out of the index, or undecodable."""
        return len(self.index.excluded) + len(self.undecodable)

    @property
    def bad_share(self) -> float:
        """Share of them among all that look like images."""
        return self.bad / (len(self.index) + len(self.index.excluded))

    @property
    def lost(self) -> list[str]:
        """Damaged tars, as far as the index says."""
        return [
            f"{name}: {reason}"
            for name, reason in self.index.excluded
            if any(text in reason for text in _LOST)
        ]

    @property
    def go_on(self) -> bool:
        """Whether a run may start."""
        return (
            self.bad_share <= self.max_bad_fraction
            and len(self.undecodable) < len(self.index)
            and not self.lost
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON; every bad image is listed."""
        mixing = self.mixing
        return {
            "path": str(self.index.root),
            "source": self.index.source,
            "digest": self.index.digest,
            "images": len(self.index),
            "tars": len(self.index.shards),
            "left_out": [{"name": name, "reason": why} for name, why in self.index.excluded],
            "undecodable": [fault._asdict() for fault in self.undecodable],
            "bad_share": self.bad_share,
            "max_bad_fraction": self.max_bad_fraction,
            "damaged_tars": self.lost,
            "sizes": {name: spread._asdict() for name, spread in self.sizes.items()},
            "labels": len(self.index.labels),
            "images_a_label": self.images_a_label,
            "unlabelled": self.unlabelled,
            "labels_a_tar": self.labels_a_tar,
            "labels_a_tar_in_a_full_shuffle": self.labels_expected,
            "mixing": mixing and {**mixing._asdict(), "is_sorted": mixing.is_sorted},
            "go_on": self.go_on,
        }


def survey(index: Index, undecodable: Sequence[Fault], max_bad_fraction: float) -> Report:
    """Count and measure what the index and the decoder found."""
    rows = index.entries
    labels: NDArray[np.int32] = rows["label"]
    known = labels >= 0
    a_label = np.bincount(labels[known], minlength=len(index.labels))
    a_tar, expected = None, None
    if len(index.shards) > 1 and len(index.labels) > 1:
        pairs = np.unique(np.stack([rows["shard"][known], labels[known]]).astype(np.int64), axis=1)
        counts = np.bincount(pairs[0], minlength=len(index.shards))
        a_tar = (int(counts.min()), int(np.median(counts)), int(counts.max()))
        expected = expected_labels(a_label, max(1, int(known.sum()) // len(index.shards)))
    pixels = rows["width"].astype(np.int64) * rows["height"]
    sizes = {"width": rows["width"], "height": rows["height"], "pixels": pixels}
    return Report(
        index,
        undecodable,
        max_bad_fraction,
        {name: spread_of(values) for name, values in {**sizes, "bytes": rows["size"]}.items()},
        (int(a_label.min()), int(np.median(a_label)), int(a_label.max())) if len(a_label) else None,
        int((~known).sum()),
        a_tar,
        expected,
        class_mixing(labels),
    )


def spread_of(values: NDArray[Any]) -> Spread:
    """Smallest, middle, 95 % and largest of some integers."""
    return Spread(*np.quantile(values, (0, 0.5, 0.95, 1), method="nearest").astype(int).tolist())


def describe(report: Report) -> str:
    """Write the report for people."""
    index = report.index
    kind = f"{len(index.shards)} tars" if index.shards else "folder"
    lines = [f"{index.root}: {kind}, {len(index)} images, index digest {index.digest[:12]}", ""]
    lines += _bad_lines(report)
    lines += ["", f"{'':8}{'min':>12}{'median':>12}{'95 %':>12}{'max':>12}"]
    for name, spread in report.sizes.items():
        lines.append(f"{name:8}" + "".join(f"{value:12,}" for value in spread))
    lines.append("")
    if report.images_a_label is None:
        lines.append("labels: none")
    else:
        low, middle, high = report.images_a_label
        lines.append(
            f"labels: {len(index.labels)}; images a label: {low} to {high}, median {middle}; "
            f"without a label: {report.unlabelled}"
        )
    if report.labels_a_tar is not None:
        low, middle, high = report.labels_a_tar
        lines.append(
            f"labels a tar: {low} to {high}, median {middle}; {report.labels_expected:.1f} in a "
            "full shuffle"
        )
    lines.append(f"order: {report.mixing or 'cannot be told from labels'}")
    lines.append(f"data.shuffle=window: {_window(report)}")
    lines += ["", f"verdict: {_verdict(report)}"]
    return "\n".join(lines)


def _bad_lines(report: Report) -> list[str]:
    index = report.index
    lines = [f"left out by their headers: {len(index.excluded)}"]
    groups: dict[str, list[str]] = {}
    for name, reason in index.excluded:
        groups.setdefault(re.sub(r"\d+", "N", reason), []).append(f"{name} ({reason})")
    for group in sorted(groups.values(), key=len, reverse=True):
        more = f" and {len(group) - _NAMED} more" if len(group) > _NAMED else ""
        lines.append(f"  {len(group)}: {', '.join(group[:_NAMED])}{more}")
    lines.append(f"undecodable: {len(report.undecodable)}")
    lines += [f"  {fault.name}: {fault.reason}" for fault in report.undecodable[:_LISTED]]
    if len(report.undecodable) > _LISTED:
        lines.append(f"  and {len(report.undecodable) - _LISTED} more; --report lists them")
    return lines


def _window(report: Report) -> str:
    if report.mixing is None:
        return "safe only if the images were shuffled when they were stored"
    return "refused, pack the images first" if report.mixing.is_sorted else "safe"


def _verdict(report: Report) -> str:
    share = f"{report.bad} of {len(report.index) + len(report.index.excluded)} images are bad"
    share += f" ({report.bad_share:.2%}, at most {report.max_bad_fraction:.2%} may be)"
    if report.lost:
        return f"stop: {len(report.lost)} tars are damaged or cut short; {share}"
    if len(report.undecodable) == len(report.index):
        return "stop: no image can be decoded"
    return f"{'go on' if report.go_on else 'stop'}: {share}"
