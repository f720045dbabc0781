"""The whole page: one file, nothing to fetch, no script."""

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files

from cmtmae_scale import __version__
from cmtmae_scale.tools.report.comparison import comparison
from cmtmae_scale.tools.report.markup import text
from cmtmae_scale.tools.report.ranges import earlier_runs
from cmtmae_scale.tools.report.run import Run
from cmtmae_scale.tools.report.sections import (
    curves_section,
    evaluation_section,
    headline,
    identity_section,
    incidents_section,
    pictures_section,
    time_section,
)

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The browser itself is told to fetch nothing."""
PICTURES_ALONE, PICTURES_COMPARED = 4, 2
PARTS = {
    "run": "What was run",
    "curves": "Curves",
    "pictures": "Pictures",
    "time": "Time",
    "incidents": "Incidents",
    "evaluation": "Evaluation",
}


def page(runs: Sequence[Run]) -> str:
    """The page of one run, or of several and their comparison."""
    if len(runs) == 1:
        title = runs[0].label
        body = headline(runs[0]) + links("") + sections(runs[0], runs, "", PICTURES_ALONE)
    else:
        title = " and ".join(run.label for run in runs)
        body = compared_links(runs) + comparison(runs)
        for place, run in enumerate(runs, 1):
            body += f'<h1 class="run" id="r{place}">{text(run.label)}</h1>{headline(run)}'
            body += links(f"r{place}-") + sections(run, runs, f"r{place}-", PICTURES_COMPARED)
    return document(title, body)


def sections(run: Run, runs: Sequence[Run], prefix: str, most: int) -> str:
    """All sections of a run; ``prefix`` tells their anchors apart."""
    others = earlier_runs(run, runs)
    return (
        identity_section(run, f"{prefix}run")
        + curves_section(run, others, f"{prefix}curves")
        + pictures_section(run, f"{prefix}pictures", most)
        + time_section(run, others, f"{prefix}time")
        + incidents_section(run, f"{prefix}incidents")
        + evaluation_section(run, others, f"{prefix}evaluation")
    )


def links(prefix: str) -> str:
    """Links to the sections of a run."""
    return navigation({prefix + anchor: title for anchor, title in PARTS.items()})


def compared_links(runs: Sequence[Run]) -> str:
    """Links to the comparison and to each run."""
    places = {"figures": "Final figures", "differences": "What differs", "overlaid": "Curves"}
    return navigation(places | {f"r{k}": run.label for k, run in enumerate(runs, 1)})


def navigation(places: dict[str, str]) -> str:
    """Links within the page."""
    items = "".join(f'<a href="#{anchor}">{text(title)}</a>' for anchor, title in places.items())
    return f'<nav aria-label="Parts of the page">{items}</nav>'


def document(title: str, body: str) -> str:
    """Head and body."""
    style = files("cmtmae_scale.tools.report").joinpath("style.css").read_text()
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header><h1>{text(title)}</h1><p class="note">CMT-MAE pre-training, as of {made}; \
cmtmae_scale {__version__}</p></header>
{body}
</main>
</body>
</html>
"""
