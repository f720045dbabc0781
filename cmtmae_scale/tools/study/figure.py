"""Results of a study as a picture: one line a row, every seed a dot, the mean a bar."""

from html import escape

from cmtmae_scale.tools.study.file import Study
from cmtmae_scale.tools.study.results import Line, Results

ROW, LEFT, WIDTH, RIGHT, TOP = 26, 210, 460, 70, 44
STYLE = """
svg { font: 13px sans-serif; fill: #222; background: #fff }
.grid { stroke: #ddd } .bar { stroke: #1f5fa8; stroke-width: 2 }
.dot { fill: #1f5fa8; fill-opacity: .45 } .mean { fill: #1f5fa8 }
.reference { stroke: #b5541c; stroke-dasharray: 5 4 } .small { font-size: 11px; fill: #555 }
"""


def as_svg(study: Study, results: Results) -> str:
    """Draw the rows that have a result, against the references as dashed lines.

    Bars are the deviation over seeds, or for one seed the 95 % interval over test images.
    """
    lines = [line for line in results.lines if line.found]
    low, high = limits(lines, results)
    height = TOP + ROW * len(lines) + 60 + 15 * len(results.references)

    def x(share: float) -> float:
        return LEFT + WIDTH * (100 * share - low) / (high - low)

    bottom = TOP + ROW * len(lines)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + RIGHT} {height}" '
        f'role="img"><style>{STYLE}</style>',
        f'<text x="{LEFT}" y="20">linear probe, {study.evaluation.features}, top-1 %</text>',
    ]
    for tick in ticks(low, high):
        at = x(tick / 100)
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP - 8}V{bottom}"/>')
        parts.append(
            f'<text class="small" x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{tick:g}</text>"
        )
    for number, one in enumerate(results.references):
        at, y = x(one.accuracy), bottom + 38 + 15 * number
        parts.append(f'<path class="reference" d="M{at:.1f} {TOP - 8}V{y - 4}"/>')
        label = f"{escape(one.name)}: {100 * one.accuracy:.1f}"
        right = at > LEFT + WIDTH / 2
        anchor, shift = ("end", -6) if right else ("start", 6)
        parts.append(
            f'<text class="small" x="{at + shift:.1f}" y="{y}" text-anchor="{anchor}">'
            f"{label}</text>"
        )
    for number, line in enumerate(lines):
        y = TOP + ROW * number + ROW / 2
        a, b = ends(line)
        parts += [
            f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(line.name)}</text>',
            f'<path class="bar" d="M{x(a):.1f} {y}H{x(b):.1f}"/>',
            *(
                f'<circle class="dot" cx="{x(one.primary):.1f}" cy="{y}" r="4"/>'
                for one in line.found
            ),
            f'<circle class="mean" cx="{x(line.mean):.1f}" cy="{y}" r="3"/>',
            f'<text class="small" x="{LEFT + WIDTH + 10}" y="{y + 4}">{100 * line.mean:.1f}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def ends(line: Line) -> tuple[float, float]:
    """Ends of a row's bar, as shares."""
    if line.deviation is None:
        return line.found[0].interval_95
    return line.mean - line.deviation, line.mean + line.deviation


def limits(lines: list[Line], results: Results) -> tuple[float, float]:
    """Lowest and highest value of the axis, %."""
    values = [100 * end for line in lines for end in ends(line)]
    values += [100 * one.primary for line in lines for one in line.found]
    values += [100 * one.accuracy for one in results.references]
    margin = max(0.05 * (max(values) - min(values)), 0.5)
    return min(values) - margin, max(values) + margin


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, some five of them."""
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50) if (high - low) / s <= 8 or s == 50)
    first = int(-(-low // step))
    return [step * k for k in range(first, int(high // step) + 1)]
