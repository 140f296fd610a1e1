"""``pertcast adapt``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from pertcast.cli.options import SetOption

__all__ = ["adapt", "command"]


command = App(name="adapt")


@command.default
def adapt(
    run: Path,
    experiment: Path,
    /,
    *,
    out: Path,
    learn: Annotated[str | None, Parameter(name="--learn")] = None,
    store: Path | None = None,
    set_: SetOption = None,
) -> None:
    """Adapt a trained run to a new cell line from a few controls and targets; a handful of parameters learns.

    The result is an ordinary run of the new line's cells, which `pertcast generate` takes; everything that does not
    learn is the trained run's, to the bit. The same command goes on where an interrupted one stopped.

    Example: `pertcast adapt run new_line.toml --out adapted --learn offset,context`

    Parameters
    ----------
    run
        The folder that `pertcast train` wrote.
    experiment
        The experiment file of the new line's cells; targets that it holds out as val say when steps stop. Model and
        features are the run's; so are the loss and [train] where the file has none.
    out
        The folder of the adapted run.
    learn
        What learns, with commas: offset (the bias of the last layer, in closed form, without steps), context (the
        line's own row of the context embedding), batch (rows of its new batches), bias (of the last layer, by steps),
        last (all of it), gain (how much of what the network adds to control cells, by least squares, without steps),
        lora:R (low-rank changes of the backbone's attention, R a rank). Default: offset.
    store
        The folder that `pertcast prepare` wrote of the new line; default: OUT_store beside the adapted run, prepared if
        need be.
    """
    from pertcast.cli.console import Console
    from pertcast.config import load_experiment
    from pertcast.data.store import prepare
    from pertcast.train.adapt import adapt as fit
    from pertcast.train.line import adapted_experiment

    overrides = [*(set_ or ()), *([f"adapt.learn={learn!r}"] if learn is not None else [])]
    resolved, console = adapted_experiment(run, load_experiment(experiment, overrides, command="adapt")), Console()
    if store is None:
        store = prepare(resolved, out.with_name(f"{out.name}_store"), progress=console)
    print(fit(run, resolved, store, out, progress=console))
