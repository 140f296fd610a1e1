"""Adapt a trained run to a new cell line from a few of its cells, by training a few parameters.

The run's baseline is refitted with the line's training effects, unless an offset is trained. Invariants: frozen
parameters stay exactly as they were. If no step is better on held-out cells, the initial weights are kept. An
interrupted adaptation resumes to the same end.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pertcast.config import Experiment
from pertcast.data.prepare import require_same_store
from pertcast.data.store import Store
from pertcast.errors import CheckpointError, ConfigError
from pertcast.files.artefacts import claimed, hash_file
from pertcast.files.resources import reused_memory
from pertcast.models.baselines import BaselineSpec
from pertcast.models.few_parameters import choose, grow, merge, parse_learn
from pertcast.models.heads import COUNTS_HEAD_PREFIX, DE_HEAD_PREFIX
from pertcast.models.run_folder import WEIGHTS, Run, load_tensors, open_run, save_run
from pertcast.models.state import StateTransition
from pertcast.processes import launched
from pertcast.progress import SILENT, Progress
from pertcast.stats.draws import key_hash
from pertcast.train.baseline import refit_base
from pertcast.train.batches import SetReader
from pertcast.train.checkpoints import is_finished, require_same_run, training_identity
from pertcast.train.closed_form import fit_offset, fit_shift
from pertcast.train.control_counts import control_rates
from pertcast.train.devices import open_fabric
from pertcast.train.loop import Loop, TrainingPlan
from pertcast.train.new_line import AlignedStore, adapted_experiment, bring_into_run, line_features, require_fitting
from pertcast.train.precision import resolve_precision
from pertcast.train.stage import require_losses
from pertcast.train.training_effects import training_effects


class _Fitted(NamedTuple):
    """Values found without steps: the gain, and the share of the targets' common error; ``None`` if not asked for."""

    gain: float | None
    offset_share: float | None


def adapt(run_path: Path, experiment: Experiment, store_path: Path, out: Path, *, progress: Progress = SILENT) -> Path:
    """Adapt a run to the cell line of a store.

    Parameters
    ----------
    run_path
        The trained run; it is left as it is.
    experiment
        Of the new line; ``[adapt]`` says what learns, ``[train]`` how. What it leaves to the run is filled in as
        :func:`pertcast.train.new_line.adapted_experiment` does, which `store_path` was prepared from.
    store_path
        The new line's store. Its training cells are what is learnt from; its validation
        cells say when to stop.
    out
        The adapted run's folder; an interrupted adaptation resumes there.
    progress
        Where steps, the loss, and how many parameters learn are told.

    Returns
    -------
    `out`, an ordinary run of that store.

    Raises
    ------
    PertcastError
        If run, store and experiment do not fit one another.
    """
    if launched() is not None:
        raise ConfigError("an adaptation runs in one process: start it without torchrun or srun")
    with claimed(out), reused_memory():
        return _adapt(run_path, experiment, store_path, out, progress)


def _adapt(run_path: Path, experiment: Experiment, store_path: Path, out: Path, progress: Progress) -> Path:
    experiment, precision_notes = resolve_precision(adapted_experiment(run_path, experiment), out)
    run, store = open_run(run_path), Store.open(store_path)
    if isinstance(run.spec, BaselineSpec):
        raise CheckpointError(
            f"{run_path}: it is a baseline, which has no few parameters to train; refit it on the new line's "
            "cells, too, or adapt a network with a base (model.base)"
        )
    require_losses(experiment)
    require_same_store(store, experiment, store.config)
    require_fitting(run, store)
    identity = _identity(run_path, experiment, store)
    require_same_run(out, identity)
    if is_finished(out, experiment.train.steps):
        progress.note(f"{out}: already adapted for {experiment.train.steps:,} steps")
        return out
    line = bring_into_run(run, store)
    features = line_features(run, experiment, store)
    reader = SetReader(line.store, experiment, features)
    effects = training_effects(line.store, reader.output_genes, progress=progress)
    known = run.baseline()
    if known is not None:
        # the mean of few targets is mostly their own; an offset takes their common part
        with_line = not parse_learn(experiment.adapt.trainable).offset
        reader.base = refit_base(known, line.store, features, effects, with_line=with_line, progress=progress)
    network, num_learning = _network(run, experiment, line, reader)
    learn = parse_learn(experiment.adapt.trainable)
    # closed forms are fitted before anything trains by steps
    fitted = _Fitted(
        gain=fit_shift(network, reader, effects) if learn.gain else None,
        offset_share=fit_offset(network, reader, effects) if learn.offset else None,
    )
    fabric = open_fabric(experiment.train, out)
    if not fabric.is_global_zero:
        progress = SILENT
    plan = TrainingPlan(
        experiment=experiment,
        store=line.store,
        out=out,
        identity=identity,
        fabric=fabric,
        features=features,
        reader=reader,
        network=network,
        rates=control_rates(line.store, reader.output_genes) if experiment.loss.nb else None,
        validates_first=True,
    )
    loop = Loop(plan, progress)
    notes = _notes(line, num_learning, loop, fitted)
    for note in (*precision_notes, *notes):
        progress.note(note)
    loop.take_steps("adapt", progress)
    if fabric.is_global_zero:
        outcome = _outcome(loop)
        _write_run(run, plan, loop, num_learning, fitted, (*run.notes, *notes, *outcome))
        for note in outcome:
            progress.note(note)
    fabric.barrier()
    return out


def _network(run: Run, experiment: Experiment, line: AlignedStore, reader: SetReader) -> tuple[StateTransition, int]:
    """Return the run's network with rows for the new line, and the number of trainable parameters."""
    spec, weights = grow(
        run.network,
        load_tensors(run.path / WEIGHTS),
        new_contexts=line.num_new_contexts,
        new_batches=line.num_new_batches,
        num_contexts=len(run.contexts),
    )
    if spec != reader.spec:
        raise CheckpointError(
            f"{run.path}: its network does not match its own experiment ({spec} is not {reader.spec}); "
            "train it again with this version"
        )
    network = StateTransition(spec)
    if any(name.startswith(DE_HEAD_PREFIX) for name in weights):
        network.add_de_head()
    elif experiment.loss.de and experiment.loss.de_head == "learned":
        raise ConfigError(f"[loss] de: the run {run.path} was trained without a DE head; set loss.de to 0")
    if any(name.startswith(COUNTS_HEAD_PREFIX) for name in weights):
        network.add_counts_head()
    elif experiment.loss.nb:
        raise ConfigError(f"[loss] nb: the run {run.path} was trained without a counts head; set loss.nb to 0")
    network.load_state_dict(weights)
    seed = key_hash(experiment.train.seed, "adapt") % 2**63
    number = choose(
        network,
        parse_learn(experiment.adapt.trainable),
        contexts=line.contexts,
        batches=line.batches,
        generator=torch.Generator().manual_seed(seed),
    )
    return network, number


def _identity(run_path: Path, experiment: Experiment, store: Store) -> dict[str, Any]:
    """Return the settings that a resumed adaptation must share."""
    return {
        "adapts": hash_file(run_path / WEIGHTS),
        "trainable": experiment.adapt.trainable,
        "store": store.fingerprint,
        **training_identity(experiment),
    }


def _notes(line: AlignedStore, num_learning: int, loop: Loop, fitted: _Fitted) -> tuple[str, ...]:
    """Return what a user should know, the same at every resumption."""
    total = sum(parameter.numel() for parameter in loop.network.parameters())
    names = ", ".join(line.store.contexts[row] for row in line.contexts)
    notes = [f"{num_learning:,} of {total:,} parameters train ({num_learning / total:.3%}), for {names}"]
    if fitted.gain is not None:
        notes.append(f"the network's shift around the line's mean effect is multiplied by {fitted.gain:.3f}")
    if fitted.offset_share is not None:
        notes.append(
            "the last bias corrects the error on the line's control cells, and of the remaining mean error on its "
            f"training targets {fitted.offset_share:.3f}"
        )
    if len(loop.val_sets) and not _takes_steps(loop.network):
        notes.append("nothing trains by steps: validation cells are not used and could train as well")
    if not len(loop.val_sets) and _takes_steps(loop.network):
        notes.append("the line has no validation cells, so the last weights are kept")
    return tuple(notes)


def _takes_steps(network: torch.nn.Module) -> bool:
    """Return whether anything trains by steps; a gain or an offset alone is fitted in closed form."""
    return any(parameter.requires_grad for parameter in network.parameters())


def _outcome(loop: Loop) -> tuple[str, ...]:
    if loop.best is None:
        return ()
    if loop.state.best_step == 0:
        return ("no step was better on the held-out cells than none: the weights before the first are kept",)
    return (f"the weights are of step {loop.state.best_step:,}, the best on the held-out cells of the line",)


def _write_run(
    run: Run, plan: TrainingPlan, loop: Loop, num_learning: int, fitted: _Fitted, notes: tuple[str, ...]
) -> None:
    state, store = loop.state, plan.store
    weights: dict[str, Tensor] = merge(loop.best if loop.best is not None else loop.network.state_dict())
    total = sum(value.numel() for value in weights.values())
    adapted = replace(
        run,
        path=plan.out,
        spec=plan.reader.spec,
        experiment=plan.experiment.as_json(),
        perts=tuple(dict.fromkeys((*run.perts, *store.perts))),
        contexts=store.contexts,
        batches=store.batches,
        scale=store.scale,
        store_path=store.path,
        store_fingerprint=store.fingerprint,
        step=state.best_step if loop.best is not None else state.step,
        metrics={
            "last_step": state.step,
            "val_loss": state.best_loss if loop.best is not None else None,
            "num_parameters": total,
            "num_learning": num_learning,
            "share_learning": num_learning / total,
            "gain": fitted.gain,
            "offset_share": fitted.offset_share,
            "stopped_early": state.step < loop.train.steps,
        },
        features={**run.features, "filled": plan.features.filled},
        notes=notes,
    )
    save_run(adapted, weights, inputs={"run": hash_file(run.path / WEIGHTS), "store": store.fingerprint})
