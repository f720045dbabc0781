"""The report in a real browser: no complaint, no request, nothing cut off, readable text."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmtmae_scale.commands.report import write_page
from tests.tools.report.browser import Page, browser, find_browser
from tests.tools.report.report_case import write_run, write_tuning

WIDTHS = {"phone": 390, "desktop": 1280}
CONTRAST = 4.5
"""Of text, by the Web Content Accessibility Guidelines 2.2, level AA."""

MEASURE = """(() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
      .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const ground = element => {
    for (let one = element; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const colour = element.closest('svg') ? style.fill : style.color;
    const pair = [light(parse(colour)), light(ground(element))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    found.push([ratio, element.tagName, element.textContent.slice(0, 40)]);
  }
  return found.sort((a, b) => a[0] - b[0])[0];
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium is installed")
    with browser(program, tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    long = "a-name-without-any-space-that-is-far-too-long-for-the-width-of-a-telephone"
    one = write_run(folder / "one")
    two = write_run(folder / "two", f"run.name={long}", "mask.ratio=0.5", seed=1)
    begun = write_run(folder / "begun")
    (begun / "log.jsonl").unlink()
    return {
        "one": write_page([one]),
        "several": write_page([one, two]),
        "begun": write_page([begun]),
        "tuned": write_page([write_tuning(folder / "tuned")]),
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["one", "several", "begun", "tuned"])
def test_a_report_is_quiet_whole_and_legible(
    page: Page, reports: dict[str, Path], name: str, width: str, scheme: str
) -> None:
    file = reports[name]
    page.open(file, WIDTHS[width], scheme)
    outside = [one for one in page.requests() if not one.startswith("data:")]
    assert outside == [file.resolve().as_uri()]
    assert page.complaints() == []
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width]
    smallest = "Math.min(...[...document.querySelectorAll('svg:not(.key)')].map("
    smallest += "s => 11.5 * s.getBoundingClientRect().width / 400))"
    if name != "begun":
        assert page.evaluate(smallest) >= 9  # CSS pixels of the smallest letters in a chart
    ratio, tag, text = page.evaluate(MEASURE)
    assert ratio >= CONTRAST, (tag, text)


def test_the_dark_page_is_dark_and_the_printed_one_white(
    page: Page, reports: dict[str, Path], tmp_path: Path
) -> None:
    def brightness(scheme: str, media: str) -> float:
        page.open(reports["one"], 800, scheme, media)
        page.screenshot(tmp_path / "shot.png")
        return float(np.median(np.asarray(Image.open(tmp_path / "shot.png").convert("L"))))

    assert brightness("light", "screen") > 235
    assert brightness("dark", "screen") < 40
    assert brightness("dark", "print") == 255


def test_all_figures_are_printed(page: Page, reports: dict[str, Path]) -> None:
    heights = "[...document.querySelectorAll('.sheet img')].map("
    heights += "i => i.getBoundingClientRect().height > 20 && i.checkVisibility("
    heights += "{contentVisibilityAuto: true}))"
    page.open(reports["one"], 800, "light", "print")
    assert page.evaluate(heights) == [True, True, True]
