"""``pertcast calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from pertcast.cli.options import SetOption

__all__ = ["calibrate", "command"]


command = App(name="calibrate")


@command.default
def calibrate(
    run: Path,
    /,
    *,
    folds: Annotated[int, Parameter(name="--folds")] = 0,
    fold_steps: Annotated[int | None, Parameter(name="--fold-steps")] = None,
    store: Path | None = None,
    set_: SetOption = None,
) -> None:
    """Choose how large effects and how wide cells should be, on targets that were held out of the fit.

    What scores best by the official metrics of season 2025 on the run's validation targets is kept in the run, as
    calibration.json; `pertcast generate RUN --set generate.calibrated=true` applies it. Targets that test are never
    looked at. Where nothing beats what the run predicts by more than a standard error, nothing changes, and it says so.

    Example: `pertcast calibrate run --set generate.cells=sparse`

    Parameters
    ----------
    run
        The folder that `pertcast train` wrote.
    folds
        Train so many networks anew beside the run (RUN_folds), each without its share of the training targets, and
        choose on those; default: the run's own validation targets.
    fold_steps
        Steps of each of them; default: as many as the run was to take.
    store
        Where the store lies now, if it has moved since training.
    """
    from pertcast.cli.console import Console
    from pertcast.ladder.calibration import calibrate as choose

    print(
        choose(
            run, store_path=store, overrides=list(set_ or ()), folds=folds, fold_steps=fold_steps, progress=Console()
        )
    )
