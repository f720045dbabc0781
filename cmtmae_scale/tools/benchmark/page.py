"""The rows of "On a GPU" in docs/performance.md, written from the suite's results."""

import re
from collections.abc import Sequence
from pathlib import Path

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.runtime.storage import write_atomic
from cmtmae_scale.tools.benchmark.jobs import Job
from cmtmae_scale.tools.benchmark.suite import DONE, OPEN, Row

BEGIN, END = "<!-- suite: begin -->", "<!-- suite: end -->"
HEADER = "| row | what | command | result |\n|---|---|---|---|\n"
ROW = re.compile(r"^\| `(\w+)` \| .* \| (.*) \|$", re.MULTILINE)
DETAILS = re.compile(r"^#### `(\w+)`\n(.*?)(?=^#### |\Z)", re.MULTILINE | re.DOTALL)


def write_page(page: Path, jobs: Sequence[Job], rows: dict[str, Row]) -> None:
    """Write the rows that were measured at full size; other rows of the page stay unchanged.

    Raises:
        ConfigError: if the page lacks the two marks.
    """
    before, own, after = split_page(page)
    results, details = dict(ROW.findall(own)), dict(DETAILS.findall(own))
    for name, row in rows.items():
        if row["state"] == DONE and not row["small"]:
            results[name] = row["headline"].replace("|", "/")
            versions = ", ".join(f"{k} {v}" for k, v in (row["versions"] or {}).items())
            origin = ", ".join(filter(None, [row["date"], row["device"], versions]))
            details[name] = f"\n{origin}\n\n{row['text']}\n\n" if row["text"] else ""
    section = render_section(jobs, results, details)
    if section != own:
        write_atomic(page, f"{before}{BEGIN}{section}{END}{after}")


def split_page(page: Path) -> tuple[str, str, str]:
    """Return the text before, between and after the marks."""
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ConfigError(f"{page} lacks the marks {BEGIN} and {END}; restore them")
    before, _, rest = text.partition(BEGIN)
    own, _, after = rest.partition(END)
    return before, own, after


def render_section(jobs: Sequence[Job], results: dict[str, str], details: dict[str, str]) -> str:
    """Return the section: one row per job, then the tables of those with a result."""
    lines = [
        f"| `{job.name}` | {job.what} | `{job.command}` | {results.get(job.name, OPEN)} |\n"
        for job in jobs
    ]
    tables = [f"#### `{job.name}`\n{details[job.name]}" for job in jobs if details.get(job.name)]
    return f"\n{HEADER}{''.join(lines)}\n{''.join(tables)}"
