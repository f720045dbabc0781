"""Verifies a cache: every checksum, and a random fraction of the rows computed again."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtmae_scale.cache.build import Builder
from cmtmae_scale.cache.codecs import (
    Encoded,
    Fidelity,
    calibrate,
    decode,
    summarise_cosines,
    token_cosines,
)
from cmtmae_scale.cache.format import Manifest, read_seal, shard_path
from cmtmae_scale.cache.reader import UNDECODED, ShardFile
from cmtmae_scale.errors import CacheError, may_pass, remedy_for
from cmtmae_scale.runtime.log import progress_bar

BLOCK = 64
"""Rows that are verified at a time."""
MIN_COSINE = 0.9995
"""Minimum 1st percentile of the cosine of standardised features."""
MIN_AGREEMENT = 0.99
"""Minimum fraction of the salient half of patches that stored and online attention share."""


def damaged_shards(
    folder: Path,
    manifest: Manifest,
    shards: Sequence[int],
    report_shards: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[int, str]]:
    """Read every byte of some shards; yield missing and damaged shards, and why.

    Raises:
        CacheError: if the store fails.
    """
    for done, shard in enumerate(shards, start=1):
        reason = shard_fault(folder, manifest, shard)
        if reason is not None:
            yield shard, reason
        report_shards(done)


def shard_fault(folder: Path, manifest: Manifest, shard: int) -> str | None:
    """Return why a shard cannot be trusted; ``None``: it is intact.

    Raises:
        CacheError: if the store fails, so that the state of the shard is unknown.
    """
    try:
        seal = read_seal(folder, manifest, shard)
        rows = bad_rows(folder, manifest, shard)
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        if not may_pass(error):
            return error.strerror or str(error)
        raise CacheError(
            f"{shard_path(folder, manifest, shard)}: cannot be read ({error.strerror}); "
            f"{remedy_for(error, '')}, or delete the file if its disk is damaged"
        ) from error
    except ValueError as error:
        return str(error)
    if seal.stored != seal.found:
        return "it differs from its SHA-256" + (f", at rows {rows}" if rows else "")
    return f"rows {rows} differ from their checksums" if rows else None


def bad_rows(folder: Path, manifest: Manifest, shard: int) -> str:
    """Return the first rows of a shard whose checksum is wrong; empty: none."""
    into = manifest.empty_rows(BLOCK)
    found: list[int] = []
    opened = ShardFile(folder, manifest, shard)
    try:
        for at in range(0, len(opened.rows), BLOCK):
            rows = opened.rows[at : at + BLOCK]
            faults = opened.read_rows(rows, into, range(len(rows)))
            pairs = zip(rows, faults, strict=True)
            found += [row for row, fault in pairs if fault not in (None, UNDECODED)]
    finally:
        opened.close()
    return ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")


@dataclass
class Comparison:
    """Stored rows against rows that are computed again."""

    rows: int
    features: Fidelity | None
    attention_error: float | None
    """Largest relative error of an attention value."""
    agreement: float | None
    """Mean fraction of the salient half of patches in common."""
    validity: int
    """Rows that are valid in only one of the two."""

    @property
    def good(self) -> bool:
        """Whether the cache may replace the teacher."""
        return (
            (self.features is None or self.features.standardised[1] >= MIN_COSINE)
            and (self.agreement is None or self.agreement >= MIN_AGREEMENT)
            and (self.attention_error is None or math.isfinite(self.attention_error))
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
            lines.append(f"  standardised 1st percentile must be at least {MIN_COSINE}")
        if self.agreement is not None:
            lines.append(
                f"attention: largest relative error {self.attention_error:.1e}; salient half in "
                f"common {self.agreement:.4f}, must be at least {MIN_AGREEMENT}"
            )
        if self.validity:
            lines.append(f"valid in only one of both: {self.validity} rows")
        return "\n".join(lines)


def compare_rows(
    builder: Builder, folder: Path, manifest: Manifest, shards: Sequence[int], share: float
) -> Comparison:
    """Compute a random fraction of the rows of intact shards again, at least one micro-batch.

    The builder has joined the cache. Only numbers per token and row are kept of the compared rows,
    since a hundredth of a large cache does not fit into memory.
    """
    size = builder.config.train.micro_batch_size
    chosen = choose_rows(manifest, shards, share, size)
    count = len(chosen)
    steps = -(-count // size)
    # Each micro-batch is spread over the whole cache, so that the first has unbiased statistics.
    plans = map(builder.plan_rows, (chosen[start::steps] for start in range(steps)))
    calibration = builder.calibration
    raw: list[Tensor] = []
    standardised: list[Tensor] = []
    errors: list[Tensor] = []
    overlaps: list[Tensor] = []
    validity = 0
    compared = 0
    with progress_bar("computing again", count, "rows") as report_rows:
        for online in builder.forward_plans(plans):
            stored = manifest.empty_rows(len(online.rows))
            readable = read_stored(folder, manifest, online.rows.tolist(), stored)
            valid = online.valid.cpu()
            validity += int((readable != valid).sum())
            both = readable & valid
            compared += len(online.rows)
            report_rows(compared)
            if not bool(both.any()):
                continue
            if "features" in stored and online.features is not None:
                ours = online.features.cpu()[both].float()
                encoded = Encoded(stored["features"], stored.get("scales"))
                kept = decode(encoded, builder.calibration)[both].float()
                calibration = calibration or calibrate([ours])
                cosines = token_cosines(ours, kept, calibration)
                raw.append(cosines[0])
                standardised.append(cosines[1])
            if "attention" in stored and online.attention is not None:
                ours, kept = online.attention.cpu()[both], stored["attention"][both].float()
                errors.append(((ours - kept).abs() / ours.clamp_min(1e-8)).max())
                overlaps.append(salient_overlaps(ours, kept))
    fidelity = error = agreement = None
    if raw:
        fidelity = Fidelity(*(summarise_cosines(torch.cat(one)) for one in (raw, standardised)))
    if errors:
        error = float(torch.stack(errors).max())
        agreement = float(torch.cat(overlaps).mean())
    return Comparison(count, fidelity, error, agreement, validity)


def choose_rows(
    manifest: Manifest, shards: Sequence[int], share: float, least: int
) -> NDArray[np.int64]:
    """Choose a random fraction of the rows of shards, at least ``least`` if possible; ascending.

    ``shards`` ascend; only the last shard of a cache has fewer rows than the others.
    """
    total = sum(len(manifest.shard_rows(shard)) for shard in shards)
    count = min(total, max(least, round(share * total)))
    chosen = np.sort(np.random.default_rng().choice(total, count, replace=False))
    number, within = np.divmod(chosen, manifest.rows_per_shard)
    return np.array(shards, np.int64)[number] * manifest.rows_per_shard + within


def read_stored(
    folder: Path, manifest: Manifest, rows: Sequence[int], into: Mapping[str, Tensor]
) -> Tensor:
    """Read ascending rows, with one shard open at a time; return which can be used, ``[B]``."""
    usable: list[bool] = []
    size = manifest.rows_per_shard
    for shard, group in groupby(range(len(rows)), key=lambda at: rows[at] // size):
        places = list(group)
        opened = ShardFile(folder, manifest, shard)
        try:
            faults = opened.read_rows([rows[at] for at in places], into, places)
        finally:
            opened.close()
        usable += [fault is None for fault in faults]
    return torch.tensor(usable)


def salient_overlaps(one: Tensor, two: Tensor) -> Tensor:
    """Return the fraction of the salient half of patches in common, ``[B]``, of maps ``[B, N]``."""
    half = one.shape[1] // 2
    salient_one, salient_two = (
        torch.zeros_like(attention, dtype=torch.bool).scatter_(
            1, attention.topk(half).indices, True
        )
        for attention in (one, two)
    )
    return (salient_one & salient_two).sum(1).float() / half
