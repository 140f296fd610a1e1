"""``pertcast unpack``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from pertcast.cli.options import ForceOption

__all__ = ["command", "unpack"]


command = App(name="unpack")


@command.default
def unpack(file: Path, /, *, out: Annotated[Path, Parameter(name=["--out", "-o"])], force: ForceOption = False) -> None:
    """Take the h5ad out of an archive.

    Example: `pertcast unpack prediction.vcc -o prediction.h5ad`

    Parameters
    ----------
    file
        The archive, a .vcc file.
    out
        The h5ad file to write.
    """
    from pertcast.cli.console import Console
    from pertcast.submission.pack import unpack as take_out

    print(take_out(file, out, force=force, progress=Console()))
