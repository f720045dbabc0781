"""Pieces of HTML; every text is escaped here."""

import html
import math
from collections.abc import Iterable, Sequence


def text(value: object) -> str:
    """A value as escaped text."""
    return html.escape(str(value))


def number(value: object, digits: int = 4) -> str:
    """A number for people: 4 digits, no trailing zeros, ``1e-5``; a dash for anything else."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    if value == int(value) and abs(value) < 1e7:
        return (
            f"{int(value):,}".replace(",", "\N{THIN SPACE}")
            if abs(value) >= 1e4
            else f"{value:.0f}"
        )
    mantissa, mark, exponent = f"{value:.{digits}g}".partition("e")
    return mantissa + (f"e{int(exponent)}" if mark else "")


def percent(value: object) -> str:
    """A share in per cent; a dash for anything else."""
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else "-"


def paragraph(sentence: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{attribute(kind)}>{text(sentence)}</p>"


def attribute(kind: str) -> str:
    """A class attribute, if there is a class."""
    return f' class="{kind}"' if kind else ""


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: int | None = None) -> str:
    """A table that scrolls by itself where it is too wide.

    Args:
        head: titles of the columns.
        rows: cells; the first of a row is its title.
        numbers: columns from this one on are aligned as numbers; ``None``: none.
    """

    def cell(place: int, value: object, kind: str = "td") -> str:
        right = ' class="number"' if numbers is not None and place >= numbers else ""
        return f"<{kind}{right}>{text(value)}</{kind}>"

    first = "".join(cell(i, name, "th") for i, name in enumerate(head))
    body = "".join(
        f"<tr>{''.join(cell(i, value, 'td' if i else 'th') for i, value in enumerate(row))}</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{first}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Names and values."""
    items = "".join(f"<div><dt>{text(a)}</dt><dd>{text(b)}</dd></div>" for a, b in pairs)
    return f'<dl class="facts">{items}</dl>'


def section(title: str, anchor: str, *parts: str) -> str:
    """A titled part of the page."""
    return f'<section id="{anchor}"><h2>{text(title)}</h2>{"".join(parts)}</section>'


def details(title: str, *parts: str, opened: bool = False) -> str:
    """A part that can be folded."""
    mark = " open" if opened else ""
    return f"<details{mark}><summary>{text(title)}</summary>{''.join(parts)}</details>"
