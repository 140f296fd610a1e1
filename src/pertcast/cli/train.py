"""``pertcast train``."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from pertcast.cli.options import RungOption, SetOption

__all__ = ["command", "train"]


command = App(name="train")


@command.default
def train(
    experiment: Path, /, *, out: Path, store: Path | None = None, rung: RungOption = None, set_: SetOption = None
) -> None:
    """Train STATE on a store; the same command goes on where an interrupted run stopped.

    The run is a folder: weights.safetensors, run.json, metrics.jsonl and the newest checkpoints.

    Example: `pertcast train experiment.toml --out run --set train.steps=2000`

    Parameters
    ----------
    experiment
        The experiment file that the store was prepared from.
    out
        The folder of the run.
    store
        The folder that `pertcast prepare` wrote; default: the folder `store` beside the run, prepared if need be.
    """
    from pertcast.cli.console import Console
    from pertcast.config import load_experiment, rung_overrides
    from pertcast.data.store import prepare
    from pertcast.train import train as fit

    resolved, console = load_experiment(experiment, (*rung_overrides(rung), *(set_ or ()))), Console()
    if store is None:
        store = prepare(resolved, out.parent / "store", progress=console)
    print(fit(resolved, store, out, progress=console))
