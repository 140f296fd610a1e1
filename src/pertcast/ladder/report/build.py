"""A folder in, one page out: gathers, computes, renders, and writes the page whole or not at all."""

from __future__ import annotations

from pathlib import Path

from pertcast.files.artefacts import atomic_file, require_replaceable
from pertcast.ladder.ledger import read_ledger
from pertcast.ladder.report import sections
from pertcast.ladder.report.cell_sections import cell_sections
from pertcast.ladder.report.gather import gather
from pertcast.ladder.report.page import render
from pertcast.ladder.report.realism_section import realism
from pertcast.progress import SILENT, Progress

__all__ = ["write_report"]

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
        Where to look for submissions; default: the folder that `place` lies in, three levels down.
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
