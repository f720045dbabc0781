"""A plan as text of at most 100 columns."""

import textwrap
from collections.abc import Iterator, Sequence

from cmtmae_scale.backends.traffic import HOP_S
from cmtmae_scale.config.batch import explain_batch
from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.tools.cache_plan import format_bytes, format_hours, format_rate, outlook_table
from cmtmae_scale.tools.plan.devices import RESERVE
from cmtmae_scale.tools.plan.plan import (
    DECODE_VIEWS_S,
    LAUNCH_S,
    Cluster,
    Plan,
    Scale,
    peak_flops_s,
)
from cmtmae_scale.tools.plan.remedies import GIB
from dataloading.passed_over import format_count

COLUMNS = 100
LABEL = 17


def render_plan(config: Config, plan: Plan) -> str:
    """Return a plan as text."""
    sections = [
        heading_lines(config, plan),
        memory_lines(plan),
        step_lines(plan),
        exchange_lines(plan),
        data_lines(plan),
        cache_lines(config, plan),
        scaling_lines(plan),
    ]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def labelled(label: str, text: str) -> str:
    """Return a text behind its label, wrapped."""
    start = f"  {label:<{LABEL}}"
    return textwrap.fill(text, COLUMNS, initial_indent=start, subsequent_indent=" " * len(start))


def heading_lines(config: Config, plan: Plan) -> Iterator[str]:
    """Yield the run, the assumptions, and the split of the batch."""
    cluster, chosen = plan.cluster, plan.chosen
    nodes = -(-cluster.gpus // cluster.node_size)
    size = min(cluster.node_size, cluster.gpus)
    yield (
        f"{plan.name} on {cluster.gpus} x {cluster.device.name}, "
        f"{format_count(nodes, 'node')} of {size}; nothing here is measured on them"
    )
    yield ""
    yield "assumed"
    for label, text in list_assumptions(config, cluster):
        yield labelled(label, text)
    yield ""
    yield "run"
    yield labelled("batch", explain_batch(config, chosen.batch))
    if plan.images.count is not None:
        yield labelled("images", f"{plan.images.count:,} ({plan.images.origin})")
    views = chosen.steps * chosen.batch.global_batch_size
    yield labelled("steps", f"{chosen.steps:,}, {views:,} views")


def list_assumptions(config: Config, cluster: Cluster) -> Iterator[tuple[str, str]]:
    """Yield the assumptions of a plan, by subject."""
    device, dtype = cluster.device, config.backend.precision
    yield (
        "device",
        f"{device.name}: {peak_flops_s(config, device) / 1e12:g} TFLOP/s in {dtype}, "
        f"{device.memory_bytes / 1e9:g} GB at {device.memory_bytes_s / 1e12:g} TB/s, "
        f"{device.link_bytes_s / 1e9:g} GB/s to the GPUs of its node ({device.source})",
    )
    yield "kernels", f"{cluster.fraction:.0%} of both rates: {cluster.fraction_origin}"
    yield (
        "network",
        f"{cluster.network_bytes_s / 1e9:g} GB/s per GPU and direction (--network-gbit), of which "
        f"and of the node's links {cluster.link_fraction:.0%} are reached, {1e6 * HOP_S:g} us per "
        "hop of a ring; nothing overlaps",
    )
    yield "host", f"{1e6 * LAUNCH_S:g} us per launch of a kernel, ahead of the device"
    yield (
        "decoding",
        f"{DECODE_VIEWS_S:g} views/s per core: measured on a CPU (docs/performance.md)",
    )
    yield "not in", "start-up, evaluation, checkpoints, failures, other users of the network"


def memory_lines(plan: Plan) -> Iterator[str]:
    """Yield the memory per GPU by part."""
    device, chosen = plan.cluster.device, plan.chosen
    yield "memory per GPU, modelled: states exact, activations of the eager student"
    for name, size in chosen.memory.items():
        yield f"  {name:<{LABEL}}{size / GIB:8.2f} GiB"
    yield (
        f"  {'at the peak':<{LABEL}}{chosen.memory_bytes / GIB:8.2f} GiB of "
        f"{device.usable_bytes / GIB:.1f}: {device.memory_bytes / 1e9:g} GB less {RESERVE:.0%} "
        "(assumed) for CUDA and NCCL"
    )


def step_lines(plan: Plan) -> Iterator[str]:
    """Yield time and cost."""
    chosen, price = plan.chosen, plan.cluster.price
    yield "time and cost, modelled"
    yield labelled("kernels", f"{1e3 * chosen.device_s:.1f} ms per step")
    yield labelled("launches", f"{1e3 * chosen.host_s:.1f} ms of the host, beside the kernels")
    yield labelled("collectives", f"{1e3 * chosen.communication_s:.1f} ms, after the kernels")
    yield labelled("step", f"{1e3 * chosen.step_s:.1f} ms")
    yield labelled(
        "images/s",
        f"{format_rate(chosen.images_s)}, {format_rate(chosen.images_s / chosen.gpus)} per GPU, "
        f"{plan.flops_fraction:.0%} of the data sheet's FLOP/s",
    )
    cost = "" if price is None else f", which cost {format_cost(price * chosen.gpu_hours)}"
    yield labelled(
        "whole run",
        f"{format_hours(24 * chosen.days)} h, {chosen.days:.3g} days; "
        f"{format_hours(chosen.gpu_hours)} GPU-hours{cost}",
    )


def format_cost(value: float) -> str:
    """Format money as a whole number."""
    return f"{value:,.0f}"


def exchange_lines(plan: Plan) -> Iterator[str]:
    """Yield the collectives of a step."""
    yield "communication per step, from one rank's side: bytes by formula, ms modelled"
    if not plan.chosen.exchanges:
        yield "  none: one GPU"
        return
    rows = [["collective", "ranks", "over", "calls", "whole tensors", "a rank sends", "ms"]]
    for one in plan.chosen.exchanges:
        sizes = [format_bytes(one.payload_bytes), format_bytes(one.sent_bytes)]
        ms = f"{1e3 * one.seconds:.2f}"
        rows.append([one.kind, str(one.ranks), one.path, str(one.calls), *sizes, ms])
    yield from aligned(rows)


def data_lines(plan: Plan) -> Iterator[str]:
    """Yield the rates at which a node must read and decode."""
    data, images = plan.data, plan.images
    yield "data per node, modelled: what reading and decoding must deliver"
    yield labelled("views", f"{format_rate(data.views_s)} per second")
    yield labelled(
        "storage",
        f"{format_bytes(data.bytes_s)}/s: {images.bytes_each / 1e3:.0f} kB per image "
        f"({images.bytes_origin})",
    )
    yield labelled(
        "decoding", f"{data.cores:.0f} cores with data.decode=torch; DALI on a GPU: not measured"
    )


def cache_lines(config: Config, plan: Plan) -> Iterator[str]:
    """Yield the size of a teacher cache, and when it saves time."""
    yield "teacher cache against the online teacher, modelled"
    if not plan.caches:
        unknown = "the number of images is unknown; give data.expected_images=N"
        yield f"  none: {unknown if needs(config).teacher else 'the run uses no teacher'}"
        return
    node = min(plan.cluster.node_size, plan.cluster.gpus)
    for name, outlooks in plan.caches.items():
        if name:
            yield f"teachers.{name}, the other teachers as they are"
        yield outlook_table(outlooks, node)  # up to all columns
    yield from textwrap.wrap(
        f"Per GPU, node: bytes that training reads; the store is assumed to give them. Building "
        f"decodes with data.workers={config.data.workers} cores per GPU. #: no view is seen twice. "
        "cmtmae precompute --plan measures teacher, decoding and store.",
        COLUMNS,
        initial_indent="  ",
        subsequent_indent="  ",
    )


def scaling_lines(plan: Plan) -> Iterator[str]:
    """Yield the table over numbers of GPUs, and where scaling stops."""
    yield "scaling of this batch, modelled: kernels, launches and communication in ms per step"
    alone = plan.scales[0].images_s
    header = ["GPUs", "micro x acc.", "GiB", "kernels", "launch", "comm.", "images/s"]
    has_price = plan.cluster.price is not None
    rows = [[*header, "linear", "days", *(["cost"] if has_price else []), "limit"]]
    rows += [scale_row(one, plan, alone) for one in plan.scales]
    yield from aligned(rows)
    yield textwrap.fill(plan.stop, COLUMNS, initial_indent="  ", subsequent_indent="  ")


def scale_row(one: Scale, plan: Plan, alone: float) -> list[str]:
    """Return a row of the scaling table."""
    price, usable = plan.cluster.price, plan.cluster.device.usable_bytes
    limits = [one.limit or "", "memory" if one.memory_bytes > usable else ""]
    parts = (one.device_s, one.host_s, one.communication_s)
    row = [str(one.gpus), f"{one.batch.micro_batch_size} x {one.batch.accumulation}"]
    row += [f"{one.memory_bytes / GIB:.1f}", *(f"{1e3 * seconds:,.1f}" for seconds in parts)]
    row += [format_rate(one.images_s), f"{one.images_s / one.gpus / alone:.0%}"]
    row.append(f"{one.days:.3g}")
    if price is not None:
        row.append(format_cost(price * one.gpu_hours))
    return [*row, ", ".join(filter(None, limits))]


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows with aligned columns: the first and the last to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        cells[-1] = row[-1].ljust(widths[-1])
        yield ("  " + "  ".join(cells)).rstrip()
