"""``pertcast train``."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from pertcast.cli.options import SetOption

__all__ = ["command", "train"]


command = App(name="train")


@command.default
def train(experiment: Path, /, *, store: Path, out: Path, set_: SetOption = None) -> None:
    """Train STATE on a store; the same command goes on where an interrupted run stopped.

    The run is a folder: weights.safetensors, run.json, metrics.jsonl and the newest checkpoints.

    Example: `pertcast train experiment.toml --store store --out run --set train.steps=2000`

    Parameters
    ----------
    experiment
        The experiment file that the store was prepared from.
    store
        The folder that `pertcast prepare` wrote.
    out
        The folder of the run.
    """
    from pertcast.cli.console import Console
    from pertcast.config import load_experiment
    from pertcast.train import train as fit

    print(fit(load_experiment(experiment, set_ or ()), store, out, progress=Console()))
