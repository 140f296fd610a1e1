"""``pertcast report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from pertcast.cli.options import ForceOption

__all__ = ["command", "report"]

command = App(name="report")


@command.default
def report(
    run: Path,
    /,
    *,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    truth: Annotated[Path | None, Parameter(name="--truth")] = None,
    ladder: Annotated[Path | None, Parameter(name="--ladder")] = None,
    force: ForceOption = False,
) -> None:
    """Write one self-contained HTML page about a run; it opens offline.

    The run in numbers, the check's verdict, the curve of each term of the loss, effect sizes, cells in PCA space, top
    DE genes, volcanoes, the budget, and the ladder of submissions. What is not there is named, with what makes it.

    Example: `pertcast report out/c2 --truth held_out.h5ad`

    Parameters
    ----------
    run
        The folder of `pertcast run`, or that of `pertcast train`.
    out
        The page; default: report.html in that folder.
    truth
        Real cells of the predicted targets, an h5ad file with control cells.
    ladder
        Where to look for packed submissions; default: the folder that the run's lies in.
    """
    from pertcast.cli.console import Console
    from pertcast.ladder.report import write_report

    print(write_report(run, out, truth=truth, ladder=ladder, force=force, progress=Console()))
