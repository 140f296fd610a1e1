"""``pertcast export``."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

__all__ = ["command", "export"]


command = App(name="export")


@command.default
def export(run: Path, /, *, out: Path) -> None:
    """Write a run as a folder that `state tx infer` reads.

    Example: `pertcast export run --out state_run`

    Parameters
    ----------
    run
        The folder that `pertcast train` or `pertcast import` wrote.
    out
        The folder to write; it must not be there yet.
    """
    from pertcast.cli.console import Console
    from pertcast.train.arc import export_run

    print(export_run(run, out, progress=Console()))
