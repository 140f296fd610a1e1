"""Small pieces of the page, with everything escaped and text for screen readers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from pertcast.ladder.report.figures import Figure, Table, number


class Section(NamedTuple):
    """A part of the page: its id, its title, its HTML, and the figures in it."""

    name: str
    title: str
    html: str
    figures: tuple[Figure, ...] = ()


def paragraph(text: str, *, kind: str = "") -> str:
    """Return a paragraph."""
    of_kind = f' class="{escape(kind)}"' if kind else ""
    return f"<p{of_kind}>{escape(text)}</p>"


def unordered(items: Iterable[str]) -> str:
    """Return a list, or nothing if it is empty."""
    lines = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{lines}</ul>" if lines else ""


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return names with their values."""
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{listed}</dl>'


def plain(value: object) -> str:
    """Return a value for readers: grouped thousands, four digits, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return number(value, 4) if isinstance(value, float) else str(value)


def table(content: Table, *, caption: str) -> str:
    """Return a table that scrolls by itself if it is too wide; the first column heads its row."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in content.header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in content.rows
    )
    label = escape(caption, quote=True)
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def details(summary: str, html: str) -> str:
    """Return a block that opens on request."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def figure(drawn: Figure) -> str:
    """Return a figure: title, choice, place, description and numbers."""
    name = escape(drawn.name, quote=True)
    choice = ""
    if drawn.choices:
        options = "".join(f"<option>{escape(option)}</option>" for option in drawn.choices)
        choice = (
            f'<p class="choice"><label for="{name}-choice">Target</label> '
            f'<select id="{name}-choice" data-figure="{name}">{options}</select></p>'
        )
    return (
        f'<figure id="figure-{name}"><h3>{escape(drawn.title)}</h3>{choice}'
        f'<div class="plot" id="{name}" role="img" aria-label="{escape(drawn.alternative, quote=True)}" '
        f'style="height:{drawn.height}px"></div>'
        + (f"<figcaption>{escape(drawn.caption)}</figcaption>" if drawn.caption else "")
        + (details("The numbers as a table", table(drawn.table, caption=drawn.title)) if drawn.table else "")
        + "</figure>"
    )


def section(name: str, title: str, *pieces: str, figures: Sequence[Figure] = ()) -> Section:
    """Return a section of some pieces."""
    return Section(name, title, "".join(pieces), tuple(figures))


def as_script(value: Any) -> str:
    """Return JSON that is safe inside a script element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
