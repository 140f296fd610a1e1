"""One HTML file that needs nothing else: its styles, its script, plotly and its data stand in it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from pertcast.files.artefacts import GENERATOR
from pertcast.ladder.report.html import Section, as_script

__all__ = ["render"]

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def _own(name: str) -> str:
    return (files("pertcast.ladder.report") / name).read_text(encoding="utf-8")


def _plotly() -> str:
    script = (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    return script.replace("</script", "<\\/script")


def render(title: str, sections: Sequence[Section], *, colophon: str) -> str:
    """Return the page.

    Parameters
    ----------
    title
        What it is about.
    sections
        Its parts, in order.
    colophon
        What made it.
    """
    drawn = {
        figure.name: {"data": figure.data, "layout": figure.layout, "choices": figure.choices}
        for part in sections
        for figure in part.figures
    }
    contents = "".join(f'<li><a href="#{part.name}">{escape(part.title)}</a></li>' for part in sections)
    plotly = f"<script>{_plotly()}</script>\n" if drawn else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{GENERATOR}
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{_own("page.css")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header>
<h1>{escape(title)}</h1>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
</header>
<noscript><p>Figures need JavaScript; their numbers stand in the tables under them.</p></noscript>
<main id="main">
{"".join(map(_part, sections))}</main>
<footer><p>{escape(colophon)}</p></footer>
{plotly}<script type="application/json" id="figures">{as_script(drawn)}</script>
<script>
{_own("page.js")}</script>
</body>
</html>
"""


def _part(part: Section) -> str:
    title = f'<h2 id="{part.name}-title">{escape(part.title)}</h2>'
    return f'<section id="{part.name}" aria-labelledby="{part.name}-title">{title}{part.html}</section>\n'
