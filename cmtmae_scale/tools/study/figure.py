"""Figure of a study's results: one line per row, one dot per seed, the mean with a bar."""

from html import escape

from cmtmae_scale.tools.report.chart import round_ticks
from cmtmae_scale.tools.study.file import Study
from cmtmae_scale.tools.study.results import Results, StudyRow

ROW, LEFT, WIDTH, RIGHT, TOP = 26, 210, 460, 70, 44
STYLE = """
svg { font: 13px sans-serif; fill: #222; background: #fff }
.grid { stroke: #ddd } .bar { stroke: #1f5fa8; stroke-width: 2 }
.dot { fill: #1f5fa8; fill-opacity: .45 } .mean { fill: #1f5fa8 }
.reference { stroke: #b5541c; stroke-dasharray: 5 4 } .small { font-size: 11px; fill: #555 }
"""


def draw_results(study: Study, results: Results) -> str:
    """Draw the rows that have a result, against the references as dashed lines.

    Bars are the standard deviation over seeds, or for one seed the 95 % interval over test images.
    """
    rows = [row for row in results.rows if row.found]
    low, high = axis_limits(rows, results)
    height = TOP + ROW * len(rows) + 60 + 15 * len(results.references)

    def x(fraction: float) -> float:
        return LEFT + WIDTH * (100 * fraction - low) / (high - low)

    bottom = TOP + ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + RIGHT} {height}" '
        f'role="img"><style>{STYLE}</style>',
        f'<text x="{LEFT}" y="20">linear probe, {study.evaluation.features}, top-1 %</text>',
    ]
    for tick in round_ticks(low, high):
        at = x(tick / 100)
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP - 8}V{bottom}"/>')
        parts.append(
            f'<text class="small" x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{tick:g}</text>"
        )
    for number, one in enumerate(results.references):
        at, y = x(one.primary.value), bottom + 38 + 15 * number
        parts.append(f'<path class="reference" d="M{at:.1f} {TOP - 8}V{y - 4}"/>')
        label = f"{escape(one.weights)}: {100 * one.primary.value:.1f}"
        right = at > LEFT + WIDTH / 2
        anchor, shift = ("end", -6) if right else ("start", 6)
        parts.append(
            f'<text class="small" x="{at + shift:.1f}" y="{y}" text-anchor="{anchor}">'
            f"{label}</text>"
        )
    for number, row in enumerate(rows):
        y = TOP + ROW * number + ROW / 2
        a, b = bar_ends(row)
        parts += [
            f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(row.name)}</text>',
            f'<path class="bar" d="M{x(a):.1f} {y}H{x(b):.1f}"/>',
            *(
                f'<circle class="dot" cx="{x(one.primary):.1f}" cy="{y}" r="4"/>'
                for one in row.found
            ),
            f'<circle class="mean" cx="{x(row.mean):.1f}" cy="{y}" r="3"/>',
            f'<text class="small" x="{LEFT + WIDTH + 10}" y="{y + 4}">{100 * row.mean:.1f}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def bar_ends(row: StudyRow) -> tuple[float, float]:
    """Return the ends of a row's bar, as fractions."""
    if row.std is None:
        return row.found[0].interval_95
    return row.mean - row.std, row.mean + row.std


def axis_limits(rows: list[StudyRow], results: Results) -> tuple[float, float]:
    """Return the lowest and highest value of the axis, %."""
    values = [100 * end for row in rows for end in bar_ends(row)]
    values += [100 * one.primary for row in rows for one in row.found]
    values += [100 * one.primary.value for one in results.references]
    margin = max(0.05 * (max(values) - min(values)), 0.5)
    return min(values) - margin, max(values) + margin
