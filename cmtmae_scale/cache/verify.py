"""Whether a cache can be trusted: every checksum, and a random share computed again."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmtmae_scale.cache.build import Builder
from cmtmae_scale.cache.codecs import Encoded, Fidelity, calibrate, decode, fidelity
from cmtmae_scale.cache.format import Manifest, part_path, read_seal
from cmtmae_scale.cache.parts import UNDECODED, PartFile
from cmtmae_scale.runtime.storage import digest

STANDARDISED = 0.9995
"""Lowest 1st percentile of the cosine of standardised features."""
AGREEMENT = 0.99
"""Lowest share of the salient half of patches that stored and live maps have in common."""


def damaged_parts(
    folder: Path,
    manifest: Manifest,
    parts: Sequence[int],
    tell: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[int, str]]:
    """Read every byte of some parts; yield those that are missing or damaged, and why."""
    for done, part in enumerate(parts, start=1):
        reason = fault(folder, manifest, part)
        if reason is not None:
            yield part, reason
        tell(done)


def fault(folder: Path, manifest: Manifest, part: int) -> str | None:
    """Why a part cannot be trusted, or ``None``."""
    seal = read_seal(folder, part)
    if seal is None:
        return "it is missing"
    try:
        if digest(part_path(folder, part)) != seal.sha256:
            rows = bad_rows(folder, manifest, part)
            return "it differs from its SHA-256" + (f", at rows {rows}" if rows else "")
        rows = bad_rows(folder, manifest, part)
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    return f"rows {rows} differ from their checksums" if rows else None


def bad_rows(folder: Path, manifest: Manifest, part: int) -> str:
    """Rows of a part whose checksum is wrong, the first few of them; empty: none."""
    into = empty_rows(manifest, 1)
    opened = PartFile(folder, manifest, part)
    try:
        faults = ((row, opened.read_row(row, into, 0)) for row in opened.rows)
        found = [row for row, fault in faults if fault not in (None, UNDECODED)]
    finally:
        opened.close()
    return ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")


def empty_rows(manifest: Manifest, count: int) -> dict[str, Tensor]:
    """Tensors to read rows into."""
    return {
        name: torch.zeros((count, *shape), dtype=dtype)
        for name, (dtype, shape) in manifest.fields().items()
    }


@dataclass
class Comparison:
    """Stored against computed again."""

    rows: int
    features: Fidelity | None
    attention_error: float | None
    """Largest relative error of a map's value."""
    agreement: float | None
    """Mean share of the salient half of patches in common."""
    validity: int
    """Rows that were valid in one and not in the other."""

    @property
    def good(self) -> bool:
        """Whether the cache may be used in place of the teacher."""
        return (
            (self.features is None or self.features.standardised[1] >= STANDARDISED)
            and (self.agreement is None or self.agreement >= AGREEMENT)
            and not self.validity
        )

    def __str__(self) -> str:
        lines = [f"computed again: {self.rows} rows"]
        if self.features is not None:
            for name, values in zip(("raw", "standardised"), self.features, strict=True):
                mean, low, least = values
                lines.append(
                    f"features, cosine, {name}: mean {mean:.6f}, 1st percentile {low:.6f}, "
                    f"minimum {least:.6f}"
                )
            lines.append(f"  standardised 1st percentile must be at least {STANDARDISED}")
        if self.agreement is not None:
            lines.append(
                f"attention: largest relative error {self.attention_error:.1e}; salient half in "
                f"common {self.agreement:.4f}, must be at least {AGREEMENT}"
            )
        if self.validity:
            lines.append(f"valid in one and not in the other: {self.validity} rows")
        return "\n".join(lines)


def compare(
    builder: Builder, folder: Path, manifest: Manifest, parts: Sequence[int], share: float
) -> Comparison:
    """Compute a random share of the rows of some parts again, at least one micro-batch.

    Args:
        builder: joined to the cache.
        folder: ``cache.dir``.
        manifest: the cache's.
        parts: those that can be read.
        share: of their rows, in [0, 1].
    """
    rows = np.concatenate(
        [np.array(manifest.rows_of(part), dtype=np.int64) for part in parts]
        or [np.zeros(0, dtype=np.int64)]
    )
    count = min(len(rows), max(builder.config.train.micro_batch_size, round(share * len(rows))))
    chosen = np.sort(np.random.default_rng().choice(rows, count, replace=False))
    live, stored, maps, kept, validity = [], [], [], [], 0
    files = {part: PartFile(folder, manifest, part) for part in {*(chosen // manifest.rows_a_part)}}
    try:
        for seen in builder.see(builder.plan(some) for some in builder.split(chosen)):
            into = empty_rows(manifest, len(seen.rows))
            good = torch.tensor(
                [
                    files[row // manifest.rows_a_part].read_row(row, into, at) is None
                    for at, row in enumerate(seen.rows.tolist())
                ]
            )
            valid = seen.valid.cpu()
            validity += int((good != valid).sum())
            both = good & valid
            if "features" in into and seen.features is not None:
                encoded = Encoded(into["features"], into.get("scales"))
                stored.append(decode(encoded, builder.calibration)[both].float())
                live.append(seen.features.cpu()[both].float())
            if "attention" in into and seen.attention is not None:
                kept.append(into["attention"][both].float())
                maps.append(seen.attention.cpu()[both])
    finally:
        for file in files.values():
            file.close()
    features = None
    if live and sum(map(len, live)):
        ours = torch.cat(live)
        calibration = builder.calibration or calibrate([ours])
        features = fidelity(ours, torch.cat(stored), calibration)
    error = agreement = None
    if maps and sum(map(len, maps)):
        one, two = torch.cat(maps), torch.cat(kept)
        error = float(((one - two).abs() / one.clamp_min(1e-8)).max())
        half = one.shape[1] // 2
        sets = [
            torch.zeros_like(each, dtype=torch.bool).scatter_(1, each.topk(half).indices, True)
            for each in (one, two)
        ]
        agreement = float((sets[0] & sets[1]).sum(1).float().mean()) / half
    return Comparison(count, features, error, agreement, validity)
