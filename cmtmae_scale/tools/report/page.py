"""The page of a report: one file without scripts or external resources."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files

from cmtmae_scale import __version__
from cmtmae_scale.tools.report.comparison import comparison_sections
from cmtmae_scale.tools.report.evaluation import evaluation_section
from cmtmae_scale.tools.report.markup import escape, paragraph, section
from cmtmae_scale.tools.report.ranges import finished_siblings
from cmtmae_scale.tools.report.run import Run
from cmtmae_scale.tools.report.sections import (
    curves_section,
    figures_section,
    headline,
    identity_section,
    incidents_section,
    time_section,
)

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Forbids the browser to fetch anything."""
FIGURES_ALONE, FIGURES_COMPARED = 4, 2
SECTIONS = {
    "run": "Run",
    "curves": "Curves",
    "figures": "Figures",
    "time": "Time",
    "incidents": "Incidents",
    "evaluation": "Evaluation",
}


def render_page(runs: Sequence[Run], reference: Sequence[Run] = ()) -> str:
    """Return the page of one run, or of several runs and their comparison.

    Expected ranges are those of ``reference``; without it, of finished runs of the same settings.
    """
    if len(runs) == 1:
        title = runs[0].label
        body = draw_safely("Outcome", "outcome", partial(headline, runs[0]))
        body += section_links(runs[0], "")
        body += run_sections(runs[0], runs, reference, "", FIGURES_ALONE)
    else:
        title = " and ".join(run.label for run in runs)
        places = {"final": "Final values", "differences": "Differences", "overlaid": "Curves"}
        places |= {f"r{place}": run.label for place, run in enumerate(runs, 1)}
        body = navigation_bar(places)
        body += draw_safely("Comparison", "final", partial(comparison_sections, runs))
        for place, run in enumerate(runs, 1):
            body += f'<h1 class="run" id="r{place}">{escape(run.label)}</h1>'
            body += draw_safely("Outcome", f"r{place}-outcome", partial(headline, run))
            prefix = f"r{place}-"
            body += section_links(run, prefix)
            body += run_sections(run, runs, reference, prefix, FIGURES_COMPARED)
    names = ("fine-tuning" if run.is_tuning else "CMT-MAE pre-training" for run in runs)
    tasks = " and ".join(dict.fromkeys(names))
    return html_document(title, tasks[0].upper() + tasks[1:], body)


def run_sections(
    run: Run, runs: Sequence[Run], reference: Sequence[Run], prefix: str, most: int
) -> str:
    """Return all sections of a run; ``prefix`` makes their anchors unique."""
    try:
        others = reference or finished_siblings(run, runs)
    except OSError:  # the parent folder cannot be listed
        others = []
    drawn = {
        "run": lambda place: identity_section(run, place),
        "curves": lambda place: curves_section(run, others, place),
        "figures": lambda place: figures_section(run, place, most),
        "time": lambda place: time_section(run, others, place),
        "incidents": lambda place: incidents_section(run, place),
        "evaluation": lambda place: evaluation_section(run, others, place),
    }
    return "".join(
        draw_safely(title, prefix + anchor, partial(drawn[anchor], prefix + anchor))
        for anchor, title in sections_of(run).items()
    )


def sections_of(run: Run) -> dict[str, str]:
    """Return the sections of a run by anchor; a fine-tuning draws no figures."""
    return {key: title for key, title in SECTIONS.items() if not run.is_tuning or key != "figures"}


def draw_safely(title: str, anchor: str, draw: Callable[[], str]) -> str:
    """Return a section, or in its place the reason why the run's files cannot be drawn."""
    try:
        return draw()
    except Exception as error:  # files of any content; a report of the other sections remains
        reason = f"This section cannot be drawn: {type(error).__name__}: {error}"
        return section(title, anchor, paragraph(f"{reason}. Its files hold unexpected values."))


def section_links(run: Run, prefix: str) -> str:
    """Return links to the sections of a run."""
    return navigation_bar({prefix + anchor: title for anchor, title in sections_of(run).items()})


def navigation_bar(places: dict[str, str]) -> str:
    """Return links within the page."""
    items = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title in places.items())
    return f'<nav aria-label="Sections">{items}</nav>'


def html_document(title: str, tasks: str, body: str) -> str:
    """Return head and body."""
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
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header><h1>{escape(title)}</h1><p class="note">{escape(tasks)}, as of {made}; \
cmtmae_scale {__version__}</p></header>
{body}
</main>
</body>
</html>
"""
