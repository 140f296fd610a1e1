"""``pertcast generate``."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from pertcast.cli.options import DevicesOption, SetOption, TargetsOption

__all__ = ["command", "generate"]


command = App(name="generate")


@command.default
def generate(
    run: Path,
    /,
    *,
    out: Path,
    targets: TargetsOption = None,
    store: Path | None = None,
    devices: DevicesOption = None,
    set_: SetOption = None,
) -> None:
    """Make the wanted number of cells for each target, one part file a target.

    The plan (how many cells each target gets under the season's cap) is shown first. A part that is already there and
    right is not made again. With several devices the targets are shared out over them; the files are the same.

    Example: `pertcast generate run --targets pert_counts_Validation.csv --out parts`

    Four GPUs: `pertcast generate run --targets pert_counts_Validation.csv --out parts --devices 4`

    Parameters
    ----------
    run
        The folder that `pertcast train` wrote.
    out
        The folder of the parts.
    store
        Where the store lies now, if it has moved since training; a run that was imported needs one.
    """
    from pertcast.cli.console import console, say
    from pertcast.generate import generate as make

    overrides = list(set_ or ())
    if targets is not None:
        overrides.append(f"submission.targets={str(targets.absolute())!r}")
    say(make(run, out, store_path=store, overrides=overrides, devices=devices or 1, progress=console()))
