"""``pertcast generate``."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from pertcast.cli.options import SetOption, TargetsOption

__all__ = ["command", "generate"]


command = App(name="generate")


@command.default
def generate(
    run: Path, /, *, out: Path, targets: TargetsOption = None, store: Path | None = None, set_: SetOption = None
) -> None:
    """Make the wanted number of cells for each target, one part file a target.

    The plan (how many cells each target gets under the season's cap) is shown first. A part that is already there and
    right is not made again.

    Example: `pertcast generate run --targets pert_counts_Validation.csv --out parts`

    Parameters
    ----------
    run
        The folder that `pertcast train` wrote.
    out
        The folder of the parts.
    store
        Where the store lies now, if it has moved since training; a run that was imported needs one.
    """
    from pertcast.cli.console import Console
    from pertcast.generate import generate as make

    overrides = list(set_ or ())
    if targets is not None:
        overrides.append(f"submission.targets={str(targets.absolute())!r}")
    print(make(run, out, store_path=store, overrides=overrides, progress=Console()))
