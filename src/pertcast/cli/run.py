"""``pertcast run``."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from pertcast.cli.options import ModelOption, RungOption, SetOption

__all__ = ["command", "run"]


command = App(name="run")


@command.default
def run(
    experiment: Path,
    /,
    *,
    out: Path | None = None,
    rung: RungOption = None,
    model: ModelOption = None,
    set_: SetOption = None,
) -> None:
    """Do every stage of an experiment: prepare, train, generate, assemble, check, pack.

    A stage whose result is there and still true is skipped; an interrupted one goes on where it stopped.

    Example: `pertcast run experiment.toml --out out --set train.steps=2000`

    Parameters
    ----------
    experiment
        The experiment file.
    out
        The folder for everything; default: a folder named as the experiment file, in the working folder.
    """
    from pertcast.cli.check import print_report
    from pertcast.cli.console import Console
    from pertcast.config import model_overrides, rung_overrides
    from pertcast.run import run_experiment

    outcome = run_experiment(
        experiment,
        out or Path(experiment.stem),
        overrides=(*rung_overrides(rung), *model_overrides(model), *(set_ or ())),
        progress=Console(),
    )
    print_report(outcome.report)
    print(outcome.archive)
