"""``pertcast train``."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from pertcast.cli.options import DevicesOption, ModelOption, NodesOption, RungOption, SetOption

__all__ = ["command", "train"]


command = App(name="train")


@command.default
def train(
    experiment: Path,
    /,
    *,
    out: Path,
    store: Path | None = None,
    rung: RungOption = None,
    model: ModelOption = None,
    devices: DevicesOption = None,
    num_nodes: NodesOption = None,
    set_: SetOption = None,
) -> None:
    """Train STATE on a store; the same command goes on where an interrupted run stopped.

    The run is a folder: weights.safetensors, run.json, metrics.jsonl and the newest checkpoints.

    The sets of a step are shared out over the devices, so losses are the same on any number of them, but for rounding.

    Example: `pertcast train experiment.toml --out run --set train.steps=2000`

    Four GPUs: `pertcast train experiment.toml --store store --out run --devices 4`

    Two machines: `torchrun --nnodes 2 --nproc-per-node 4 -m pertcast train experiment.toml --store store --out run`

    Parameters
    ----------
    experiment
        The experiment file that the store was prepared from.
    out
        The folder of the run.
    store
        The folder that `pertcast prepare` wrote; default: the folder `store` beside the run, prepared if need be.
    """
    from pertcast.cli.console import console, say
    from pertcast.config import load_experiment, model_overrides, rung_overrides
    from pertcast.data.store import Store, prepare
    from pertcast.errors import ConfigError
    from pertcast.preflight import preflight
    from pertcast.processes import launched

    asked = {"train.devices": devices, "train.num_nodes": num_nodes}
    options = [f"{key}={value}" for key, value in asked.items() if value is not None]
    overrides = (*rung_overrides(rung), *model_overrides(model), *options, *(set_ or ()))
    resolved, progress = load_experiment(experiment, overrides, command="train"), console()
    if store is None:
        if launched() is not None:
            raise ConfigError(
                "under torchrun or srun the store must be there: run `pertcast prepare`, and give --store"
            )
        preflight(resolved, out=out.parent, progress=progress)
        store = prepare(resolved, out.parent / "store", progress=progress)
    else:
        preflight(resolved, store=Store.open(store), progress=progress)
    from pertcast.train import train as fit

    say(fit(resolved, store, out, progress=progress))
