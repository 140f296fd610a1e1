"""Write the report as one HTML file with its styles, script, plotly and data."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from pertcast.files.artefacts import GENERATOR, atomic_file, require_replaceable
from pertcast.ladder.ledger import read_ledger
from pertcast.ladder.report import sections
from pertcast.ladder.report.gather import gather
from pertcast.ladder.report.html import Section, as_script
from pertcast.ladder.report.sections import cell_sections, realism
from pertcast.progress import SILENT, Progress

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def _own(name: str) -> str:
    return (files("pertcast.ladder.report") / name).read_text(encoding="utf-8")


def _plotly() -> str:
    script = (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    return script.replace("</script", "<\\/script")


def render(title: str, sections: Sequence[Section], *, colophon: str) -> str:
    """Return the page."""
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
<noscript><p>Figures need JavaScript; their numbers are in the tables below them.</p></noscript>
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


_DEPTH_OF_SIBLINGS = 3


def write_report(
    place: Path,
    out: Path | None = None,
    *,
    truth: Path | None = None,
    ladder: Path | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Write the page about a run.

    Parameters
    ----------
    place
        The folder of ``pertcast run``, or a run's own folder; what is missing is said on the page.
    out
        The page; default: ``report.html`` in `place`.
    truth
        Real cells of the predicted targets, an h5ad file, to set beside the predicted ones.
    ladder
        Where to look for submissions; default: the folder of `place`, three levels down.
    force
        Whether to replace a file at `out` that pertcast did not write.

    Returns
    -------
    The page.

    Raises
    ------
    PertcastError
        If there is neither a run nor a prediction, or one of them cannot be read.
    """
    material = gather(place)
    page = out or material.place / "report.html"
    require_replaceable(page, force=force)
    with_cells = cell_sections(material, truth=truth, progress=progress)
    around = material.place.absolute()
    ledger = read_ledger([ladder]) if ladder else read_ledger([around.parent], depth=_DEPTH_OF_SIBLINGS)
    parts = [
        sections.run_in_numbers(material),
        sections.check(material),
        sections.training(material),
        *with_cells,
        realism(material),
        sections.budget(material),
        sections.ladder(material, ledger),
    ]
    text = render(f"Report of {around.name}", parts, colophon=sections.colophon())
    with atomic_file(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return page
