"""``pertcast assemble``."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from pertcast.cli.options import ForceOption

__all__ = ["assemble", "command"]


command = App(name="assemble")


@command.default
def assemble(parts: Path, /, *, out: Path, force: ForceOption = False) -> None:
    """Join the parts and the control cells into one h5ad: the exact genes, float32, one scale.

    Example: `pertcast assemble parts --out prediction.h5ad`

    Parameters
    ----------
    parts
        The folder that `pertcast generate` wrote.
    out
        The prediction, an h5ad file.
    """
    from pertcast.cli.console import Console
    from pertcast.submission.assemble import assemble as join

    print(join(parts, out, force=force, progress=Console()))
