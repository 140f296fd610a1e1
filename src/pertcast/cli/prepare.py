"""``pertcast prepare``."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from pertcast.cli.options import SetOption

__all__ = ["command", "prepare"]


command = App(name="prepare")


@command.default
def prepare(experiment: Path, /, *, out: Path, set_: SetOption = None) -> None:
    """Read the h5ad files of an experiment into a training store.

    The store is a folder of arrays that are read cell by cell: counts or log1p values, obs codes, the split, highly
    variable genes.
    It is written whole or not at all, and left as it is when it is already what the experiment asks for.

    Example: `pertcast prepare experiment.toml --out store`

    Parameters
    ----------
    experiment
        The experiment file, a superset of cell-load's starter.toml.
    out
        The folder of the store.
    """
    from pertcast.cli.console import Console
    from pertcast.config import load_experiment
    from pertcast.data.store import prepare as build

    print(build(load_experiment(experiment, set_ or (), command="prepare"), out, progress=Console()))
