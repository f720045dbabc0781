"""Line charts as inline SVG, with a text legend; the page's style sets the colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter

from cmtmae_scale.tools.report.markup import escape, format_number

Point = tuple[float, float]

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 24
BUCKETS = 150
"""A longer line is drawn by the lowest and highest value in each of this many intervals."""


@dataclass
class Line:
    """One curve."""

    label: str
    points: list[Point]
    planned: bool = False
    """Whether the values are scheduled, not measured: thin and grey."""


@dataclass
class Band:
    """Lowest and highest value of several runs."""

    label: str
    points: list[tuple[float, float, float]]


@dataclass
class Chart:
    """Lines, bands and levels in one frame."""

    title: str
    lines: list[Line]
    note: str = ""
    bands: list[Band] = field(default_factory=list[Band])
    levels: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    """Horizontal lines: value and meaning."""


def draw_chart(chart: Chart) -> str:
    """Return a chart as an HTML figure."""
    # A line without points keeps its colour, so that a run has one colour in a comparison.
    numbered = zip(chart.lines, colour_numbers(chart.lines), strict=True)
    # What follows costs the same for any number of steps.
    pairs = [
        (replace(line, points=thin_out(line.points)), colour)
        for line, colour in numbered
        if line.points
    ]
    shown = [line for line, _ in pairs]
    frame = Frame.around(shown, chart.bands, chart.levels)
    marks = [frame.grid()]
    marks += [frame.band(band) for band in chart.bands]
    marks += [frame.level(value, meaning) for value, meaning in chart.levels]
    # schedules first, so that measured lines are on top
    order = sorted(pairs, key=lambda pair: not pair[0].planned)
    marks += [frame.line(line, colour) for line, colour in order]
    summary = "; ".join(summarise_line(line) for line in shown if not line.planned)
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    return (
        f'<figure class="chart"><figcaption>{escape(chart.title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}">'
        f"{''.join(marks)}</svg>{chart_legend(pairs, chart.bands)}{note}</figure>"
    )


def draw_charts(found: Sequence[Chart]) -> str:
    """Draw charts side by side."""
    return f'<div class="charts">{"".join(map(draw_chart, found))}</div>'


def colour_numbers(lines: Sequence[Line]) -> list[int]:
    """Return the colour number of each line; 0 is the colour of schedules."""
    measured = iter(range(1, len(lines) + 1))
    return [0 if line.planned else (next(measured) - 1) % 6 + 1 for line in lines]


def summarise_line(line: Line) -> str:
    """Return first and last value of a line, for screen readers."""
    (first, before), (last, after) = line.points[0], line.points[-1]
    return (
        f"{line.label}: {format_number(before)} at step {format_number(first)}, "
        f"{format_number(after)} at step {format_number(last)}"
    )


def chart_legend(lines: Sequence[tuple[Line, int]], bands: Sequence[Band]) -> str:
    """Return labels, with the last value of measured lines."""
    items = [
        f'<li><svg class="key" viewBox="0 0 26 8" aria-hidden="true">'
        f'<path class="s{colour}" d="M1 4H25"/></svg>{escape(line.label)}'
        + ("" if line.planned else f" <b>{format_number(line.points[-1][1])}</b>")
        + "</li>"
        for line, colour in lines
    ]
    items += [
        '<li><svg class="key" viewBox="0 0 26 8" aria-hidden="true">'
        f'<rect class="band" width="26" height="8"/></svg>{escape(band.label)}</li>'
        for band in bands
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


@dataclass
class Frame:
    """Ranges and co-ordinates of a chart."""

    x: tuple[float, float]
    y: tuple[float, float]

    @classmethod
    def around(
        cls, lines: Sequence[Line], bands: Sequence[Band], levels: Sequence[tuple[float, str]]
    ) -> "Frame":
        """Return a frame that holds everything, with padding above and below."""
        xs = [x for line in lines for x, _ in line.points]
        ys = [y for line in lines for _, y in line.points]
        right = max(xs, default=1.0)
        ys += [y for band in bands for x, *pair in band.points if x <= right for y in pair]
        ys += [value for value, _ in levels]
        low, high = min(ys, default=0.0), max(ys, default=1.0)
        pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        floor = 0.0 if low >= 0 and low - pad < 0.35 * high else low - pad
        return cls((min(0.0, min(xs, default=0.0)), max(right, 1.0)), (floor, high + pad))

    def place(self, x: float, y: float) -> str:
        """Return SVG co-ordinates."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        left = LEFT + across * (WIDTH - LEFT - RIGHT)
        return f"{left:.1f} {HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM):.1f}"

    def grid(self) -> str:
        """Draw lines and labels of both axes."""
        marks: list[str] = []
        for y in round_ticks(*self.y):
            start, end = self.place(self.x[0], y), self.place(self.x[1], y)
            marks.append(f'<path class="grid" d="M{start}L{end}"/>')
            height = start.split()[1]
            marks.append(
                f'<text class="left" x="{LEFT - 6}" y="{height}" dy=".35em">'
                f"{format_number(y)}</text>"
            )
        for x in round_ticks(*self.x):
            across = self.place(x, self.y[0]).split()[0]
            edge = ' class="end"' if float(across) > WIDTH - RIGHT - 20 else ' class="middle"'
            marks.append(f'<text{edge} x="{across}" y="{HEIGHT - 7}">{format_number(x)}</text>')
        return "".join(marks)

    def line(self, line: Line, colour: int) -> str:
        """Draw a curve, or a dot for a single point."""
        points = thin_out(line.points)
        if len(points) == 1:
            x, y = self.place(*points[0]).split()
            return f'<circle class="s{colour}" cx="{x}" cy="{y}" r="3"/>'
        inside = [point for point in points if point[0] <= self.x[1]]
        drawn = "L".join(self.place(*point) for point in inside)
        return f'<path class="s{colour}" d="M{drawn}"/>'

    def band(self, band: Band) -> str:
        """Draw an area."""
        inside = [point for point in band.points if point[0] <= self.x[1]]
        if not inside:
            return ""
        upper = [self.place(x, high) for x, _, high in inside]
        lower = [self.place(x, low) for x, low, _ in reversed(inside)]
        return f'<path class="band" d="M{"L".join(upper + lower)}Z"/>'

    def level(self, value: float, meaning: str) -> str:
        """Draw a horizontal line with a label."""
        start, end = self.place(self.x[0], value), self.place(self.x[1], value)
        height = float(start.split()[1])
        above = height - 5 if height > TOP + 18 else height + 13
        return (
            f'<path class="level" d="M{start}L{end}"/>'
            f'<text class="end meaning" x="{WIDTH - RIGHT}" y="{above:.1f}">'
            f"{escape(meaning)}</text>"
        )


def thin_out(points: Sequence[Point]) -> list[Point]:
    """Keep the ends, and the lowest and the highest point in each interval: peaks stay.

    A line that has been thinned out stays as it is.
    """
    if len(points) <= 2 * BUCKETS + 2:
        return list(points)
    kept: list[Point] = []
    height = itemgetter(1)
    for bucket in range(BUCKETS):
        low, high = (len(points) * k // BUCKETS for k in (bucket, bucket + 1))
        interval = points[low:high]
        kept += sorted({min(interval, key=height), max(interval, key=height)})
    return [points[0], *(p for p in kept if p not in (points[0], points[-1])), points[-1]]


def round_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Return round numbers within a range."""
    raw = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first
    return [round((first + k) * step, 12) for k in range(count + 1)]
