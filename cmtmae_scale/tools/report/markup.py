"""HTML elements; every text is escaped here."""

import html
from collections.abc import Iterable, Sequence


def escape(value: object) -> str:
    """Return a value as escaped text; what UTF-8 cannot encode is written as an escape."""
    return html.escape(str(value).encode(errors="backslashreplace").decode())


def format_number(value: object, digits: int = 4) -> str:
    """Format a number with 4 digits and no trailing zeros, as ``1e-5``; a dash for other values."""
    if not isinstance(value, int | float) or not -1e300 < value < 1e300:
        return "-"
    if value == int(value) and abs(value) < 1e7:
        grouped = f"{int(value):,}".replace(",", "\N{THIN SPACE}")
        return grouped if abs(value) >= 1e4 else f"{value:.0f}"
    mantissa, mark, exponent = f"{value:.{digits}g}".partition("e")
    return mantissa + (f"e{int(exponent)}" if mark else "")


def format_percent(value: object) -> str:
    """Format a fraction in per cent; a dash for other values."""
    if not isinstance(value, int | float) or not -1e300 < value < 1e300:
        return "-"
    return f"{100 * value:.1f} %"


def paragraph(sentence: str, kind: str = "") -> str:
    """Return a paragraph of plain text."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{escape(sentence)}</p>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: int | None = None) -> str:
    """Return a table that scrolls where it is too wide.

    The first cell of a row is its title. Columns from ``numbers`` on are aligned as numbers;
    ``None``: no column.
    """

    def cell(column: int, value: object, kind: str = "td") -> str:
        right = ' class="number"' if numbers is not None and column >= numbers else ""
        return f"<{kind}{right}>{escape(value)}</{kind}>"

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
    """Return a list of names and values."""
    items = "".join(f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd></div>" for a, b in pairs)
    return f'<dl class="facts">{items}</dl>'


def section(title: str, anchor: str, *parts: str) -> str:
    """Return a section with a title."""
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def details(title: str, *parts: str, opened: bool = False) -> str:
    """Return a collapsible element."""
    mark = " open" if opened else ""
    return f"<details{mark}><summary>{escape(title)}</summary>{''.join(parts)}</details>"
