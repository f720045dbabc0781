"""Figure of a study's logged values over the steps, one panel per value."""

from html import escape

from cmtmae_scale.tools.report.chart import HEIGHT, WIDTH, Band, Frame, Line
from cmtmae_scale.tools.report.ranges import band_of_curves
from cmtmae_scale.tools.study.results import Results, StudyRow

PANELS = {
    "eval/effective_rank": "effective rank of the patch tokens",
    "eval/patch_cosine": "cosine of the patches of an image",
    "diagnostics/effective_rank": "effective rank of the EMA weights' target tokens",
    "diagnostics/pairwise_cosine": "pairwise cosine of the EMA weights' target tokens",
    "eval/knn10": "k-NN accuracy during the run, k = 10",
    "eval/linear": "linear accuracy during the run",
}
"""Logged value and title of each panel; a panel without a curve is not drawn."""
COLOURS = ("#0b62b0", "#b4530a", "#0c7a5c", "#8a3690", "#b3261e", "#5b6472")
"""Colours of the rows, in order; at most as many rows are drawn."""
GAP, HEAD = 16, 24
STYLE = """
svg { font: 12px sans-serif; fill: #5c6068; background: #fff }
path { fill: none } .grid { stroke: #e6e6e2 } .left, .end { text-anchor: end }
.middle { text-anchor: middle } .title { font-size: 13px; fill: #222 }
"""


def draw_curves(results: Results) -> str | None:
    """Draw the rows with the most planned seeds, at most six: mean and range over seeds.

    Returns:
        ``None`` where none of their runs has a logged value.
    """
    found = [row for row in results.rows if row.found]
    most = max((row.num_seeds for row in found), default=0)
    rows = [row for row in found if row.num_seeds == most][: len(COLOURS)]
    panels = {name: draw_panel(rows, name) for name in PANELS}
    drawn = {name: marks for name, marks in panels.items() if marks}
    if not drawn:
        return None
    parts: list[str] = []
    for place, (name, marks) in enumerate(drawn.items()):
        x, y = (place % 2) * (WIDTH + GAP), (place // 2) * (HEIGHT + HEAD + GAP)
        title = f'<text class="title" x="50" y="14">{escape(PANELS[name])}</text>'
        inner = f'<g transform="translate(0 {HEAD})">{marks}</g>'
        parts.append(f'<g transform="translate({x} {y})">{title}{inner}</g>')
    bottom = (len(drawn) + 1) // 2 * (HEIGHT + HEAD + GAP)
    for place, (row, colour) in enumerate(zip(rows, COLOURS, strict=False)):
        x, y = 50 + (place % 3) * 270, bottom + 14 + 20 * (place // 3)
        parts.append(
            f'<path stroke="{colour}" stroke-width="2" d="M{x} {y - 4}h24"/>'
            f'<text x="{x + 30}" y="{y}">{escape(row.name)}, seeds: {len(row.found)}</text>'
        )
    height = bottom + 20 * ((len(rows) + 2) // 3) + 22
    parts.append(f'<text x="50" y="{height - 6}">over steps; mean and range of the seeds</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH + 5 * GAP} {height}" '
        f'role="img"><style>{STYLE}</style>{"".join(parts)}</svg>\n'
    )


def draw_panel(rows: list[StudyRow], name: str) -> str:
    """Draw one logged value of all rows; empty where no row has it."""
    lines: list[tuple[Line, Band, str]] = []
    for row, colour in zip(rows, COLOURS, strict=False):
        curves = [curve for one in row.found if (curve := one.series.get(name))]
        if curves:
            points = band_of_curves([[(float(x), y) for x, y in curve] for curve in curves])
            middle = [(x, mean) for x, mean, _, _ in points]
            band = Band("", [(x, low, high) for x, _, low, high in points])
            lines.append((Line(row.name, middle), band, colour))
    if not lines:
        return ""
    frame = Frame.around([line for line, _, _ in lines], [band for _, band, _ in lines], [])
    marks = [frame.grid()]
    for line, band, colour in lines:
        area, curve = frame.band(band), frame.line(line, 1)
        marks.append(area.replace('class="band"', f'style="fill:{colour};fill-opacity:.15"'))
        style = f"stroke:{colour};stroke-width:2"
        style += f";fill:{colour}" if curve.startswith("<circle") else ""
        marks.append(curve.replace('class="s1"', f'style="{style}"'))
    return "".join(marks)
