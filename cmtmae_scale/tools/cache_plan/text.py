"""The text of ``--plan``: what was measured, counted, given and modelled, and the table."""

import textwrap
from collections.abc import Iterator

import torch

from cmtmae_scale.config.schema import Config
from cmtmae_scale.tools.cache_plan.cost import Job, Outlook, Prices, Rates
from cmtmae_scale.tools.cache_plan.rates import Measured

COLUMNS = 100
DROPPED = 0.01
"""Share of pages in memory that is not worth a word."""


def table(outlooks: list[Outlook], node: int) -> str:
    """The outlooks as aligned text of at most 100 columns.

    Args:
        outlooks: at least one.
        node: GPUs of a node.
    """
    lines = [["codec", "views", "disk", "a GPU", f"node of {node}", "build h", "run h"]]
    if outlooks[0].saved is not None:
        lines[0].append("saved")
    lines[0].append("pays in time")
    for one in outlooks:
        line = [one.codec, str(one.views), size(one.disk_bytes)]
        line += [f"{size(rate)}/s" for rate in (one.read_gpu, node * one.read_gpu)]
        line += [hours(one.build_h), hours(one.run_h) + ("*" if one.starved else " ")]
        if one.saved is not None:
            line.append(f"{one.saved:+,.0f}" if abs(one.saved) < 1e7 else f"{one.saved:+.3g}")
        lines.append([*line, one.verdict])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text: list[str] = []
    for line in lines:
        padded = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        padded[0], padded[-1] = line[0].ljust(widths[0]), line[-1]
        text.append("  ".join(padded))
    return "\n".join(text)


def size(count: float) -> str:
    """Bytes with three digits and a unit of powers of ten."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} PB" if count < 999.5 else f"{count:,.0f} PB"


def rate(value: float) -> str:
    """Images a second: whole ones from a hundred on, else three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def hours(value: float) -> str:
    """Hours with three digits, or whole ones."""
    return f"{value:,.0f}" if 100 <= value < 1e6 else f"{value:.3g}"


def measured_lines(
    config: Config, found: Measured, dtype: torch.dtype, device: torch.device
) -> Iterator[str]:
    """What was measured, and how; ``dtype`` is the teacher's compute type."""
    name = str(dtype).removeprefix("torch.")
    yield f"measured here, by one process ({device_name(device)})"
    yield f"  teacher     {rate(found.teacher)} images/s: {name}, {found.batch} at once"
    if found.decode is None:
        yield "  decoding    not measured, taken to be fast enough: data.path is absent"
    else:
        yield f"  decoding    {rate(found.decode)} views/s: {config.data.workers} threads"
    yield f"  writing     {size(found.store.write)}/s: whole parts, checksums and fsync included"
    share = found.store.in_memory
    how = "from storage"
    if share is None:
        how = "perhaps from memory: this file system does not tell"
    elif share > DROPPED:
        how = f"{share:.0%} from memory: it could not be dropped"
    yield f"  reading     {size(found.store.read)}/s: rows at random, checksums included; {how}"


def taken_lines(config: Config, job: Job, counted: bool) -> list[str]:
    """What was counted, given or modelled."""
    origin = f"counted in {config.data.path}" if counted else "data.expected_images, not counted"
    noun = "GPU" if job.gpus == 1 else "GPUs"
    return [
        "counted, given or modelled",
        f"  images      {job.images:,}: {origin}",
        f"  run         {job.draws:,} views, {job.epochs:,.4g} epochs, on {job.gpus} {noun}",
    ]


def rate_lines(rates: Rates, found: Measured, given: bool) -> Iterator[str]:
    """Where the rates of a GPU come from."""
    origin = "given" if given else "modelled by operations; see --images-s"
    yield f"  training    {rate(rates.train)} images/s a GPU without teacher, {origin}"
    if rates.teacher != found.teacher:
        yield f"  teacher     {rate(rates.teacher)} images/s a GPU, modelled by operations"


def device_name(device: torch.device) -> str:
    """Name of what computes."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def notes(config: Config, prices: Prices | None, of_cpu: bool) -> Iterator[str]:
    """What the table means, in lines."""
    yield from textwrap.wrap(
        "A GPU, node: what reading needs while they train. Hours are modelled: building goes at "
        "the slower of each GPU's teacher and decoding, all together no faster than one process "
        "wrote here; a live teacher and training take turns; reading runs beside training, and "
        "every GPU gets the rate above. *: reading is slower than the GPU.",
        COLUMNS,
    )
    yield from textwrap.wrap(
        "From run N: building once pays from the N-th run on the same views. #: never in one run, "
        "which has no more epochs than views and sees none twice, so that building looks at no "
        "fewer than a live teacher would.",
        COLUMNS,
    )
    if prices is not None:
        yield "Saved: by one run, storage paid from the start of building to the run's end."
    if config.cache.spot_check:
        yield f"cache.spot_check={config.cache.spot_check:g} is counted."
    if of_cpu:
        yield "These are hours of this CPU; for GPUs run this on one, or give --images-s."
