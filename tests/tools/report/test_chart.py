"""Charts: round ticks, no lost peaks, every line named and within the frame."""

import math
import re

import pytest

from cmtmae_scale.tools.report.chart import (
    BUCKETS,
    HEIGHT,
    WIDTH,
    Band,
    Chart,
    Line,
    draw_chart,
    round_ticks,
    thin_out,
)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 60, [0, 20, 40, 60]),
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (-0.3, 0.5, [-0.2, 0, 0.2, 0.4]),
        (0.9898, 1.0002, [0.99, 0.995, 1]),
        (0, 3.1e-5, [0, 1e-5, 2e-5, 3e-5]),
    ],
)
def test_ticks_are_round_and_within(low: float, high: float, expected: list[float]) -> None:
    assert round_ticks(low, high) == pytest.approx(expected, abs=1e-12)


def test_a_long_line_keeps_its_ends_and_its_peaks() -> None:
    points = [(float(x), math.sin(x / 500)) for x in range(100_000)]
    points[31_415] = (31_415.0, 9.0)
    points[77_777] = (77_777.0, -9.0)
    kept = thin_out(points)
    assert len(kept) <= 2 * BUCKETS + 2
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert {points[31_415], points[77_777]} <= set(kept)
    assert kept == sorted(kept)
    assert thin_out(points[:50]) == points[:50]
    assert thin_out(kept) == kept


def coordinates(svg: str) -> list[tuple[float, float]]:
    drawn = re.findall(r' d="([^"]+)"', svg.split("</svg>")[0])
    numbers = [float(one) for path in drawn for one in re.findall(r"-?[\d.]+", path)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


@pytest.mark.parametrize(
    "values", [[1.0], [2.0, 2.0], [0.0, 0.0], [-5.0, 1e9], [1e-12, 3e-12], [1.0, 2.0, 0.5, -3.0]]
)
def test_everything_lies_within_the_frame(values: list[float]) -> None:
    points = [(10.0 * k, value) for k, value in enumerate(values, 1)]
    band = Band("range", [(x, y - 1, y + 1) for x, y in points] + [(999.0, -1e12, 1e12)])
    chart = Chart("title", [Line("a", points), Line("b", points, True)], "", [band], [(0.25, "x")])
    places = coordinates(draw_chart(chart))
    assert places
    assert all(-0.1 <= x <= WIDTH + 0.1 and -0.1 <= y <= HEIGHT + 0.1 for x, y in places)


def test_lines_differ_in_colour_and_are_named_for_screen_readers() -> None:
    lines = [Line("one", [(1, 2.0), (2, 1.5)]), Line("two & <three>", [(1, 3.0), (2, 2.5)])]
    drawn = draw_chart(Chart("Loss", lines))
    assert 'class="s1"' in drawn and 'class="s2"' in drawn
    assert "one: 2 at step 1, 1.5 at step 2" in drawn
    assert "two &amp; &lt;three&gt;" in drawn and "<three>" not in drawn
