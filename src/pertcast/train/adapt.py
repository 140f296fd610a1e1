"""Few-shot adaptation: a trained run and some cells of a new line in, an ordinary run out; few parameters learn.

A baseline that the network stands on is refitted with the line's training effects, unless an offset is learnt.
Invariants: what does not learn is the trained run's, to the bit; where no step is better on the held-out cells of the
line than the weights before the first, these come out; a run that was stopped goes on to the same end.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pertcast.config import Experiment
from pertcast.data.features import PertFeatures
from pertcast.data.prepare import require_same_store
from pertcast.data.store import Store
from pertcast.errors import CheckpointError, ConfigError
from pertcast.files.artefacts import claimed, hash_file
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
from pertcast.train.checkpoints import MetricsLog, Position, load_newest, restore, training_identity
from pertcast.train.closed_form import fit_offset, fit_shift
from pertcast.train.control_counts import control_rates
from pertcast.train.devices import open_fabric
from pertcast.train.loop import Loop, make_optimizer
from pertcast.train.loss_targets import learn_truth
from pertcast.train.loss_terms import needs_truth
from pertcast.train.new_line import Line, adapted_experiment, bring_into_run, line_features, require_fitting
from pertcast.train.precision import resolve_precision
from pertcast.train.stage import METRICS, begin_run, is_finished, require_losses, require_same_run
from pertcast.train.training_effects import TrainingEffects, training_effects


class _Fitted(NamedTuple):
    """What was found without steps: the gain, and the share of the targets' common error; ``None`` if not asked for."""

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
        The adapted run's folder; an adaptation that was stopped goes on there.
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
        raise ConfigError("an adaptation is small and runs in one process: start it without torchrun or srun")
    with claimed(out):
        return _adapt(run_path, experiment, store_path, out, progress)


def _adapt(run_path: Path, experiment: Experiment, store_path: Path, out: Path, progress: Progress) -> Path:
    experiment, precision_notes = resolve_precision(adapted_experiment(run_path, experiment), out)
    run, store = open_run(run_path), Store.open(store_path)
    if isinstance(run.spec, BaselineSpec):
        raise CheckpointError(
            f"{run_path}: it is a baseline, in which no few parameters could learn; fit it anew on the new line's "
            "cells, too, or adapt a network that stands on one (model.base)"
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
        # the whole mean of few targets is mostly their own; an offset takes what they have in common
        with_line = not parse_learn(experiment.adapt.learn).offset
        reader.base = refit_base(known, line.store, features, effects, with_line=with_line, progress=progress)
    network, num_learning = _network(run, experiment, line, reader)
    fitted = _fit(network, experiment, reader, effects)
    fabric = open_fabric(experiment.train, out)
    if not fabric.is_global_zero:
        progress = SILENT
    optimizer = make_optimizer(network, experiment.train, fabric.device)
    model, stepper = fabric.setup(network, optimizer)
    saved, notes = load_newest(out)
    best = restore(saved, model=network, optimizer=optimizer) if saved else None
    position = saved.position if saved else Position()
    fabric.barrier()
    if fabric.is_global_zero:
        begin_run(out, identity, features, base=reader.base)
    loop = Loop(
        out=out,
        fabric=fabric,
        network=network,
        model=model,
        optimizer=optimizer,
        stepper=stepper,
        reader=reader,
        train=experiment.train,
        loss=experiment.loss,
        position=position,
        best=best,
        val_sets=reader.validation(),
        log=MetricsLog(out / METRICS, position) if fabric.is_global_zero else None,
        validates_first=True,
    )
    if needs_truth(experiment.loss):
        rates = control_rates(line.store, reader.output_genes) if experiment.loss.nb else None
        truth = learn_truth(
            line.store, reader.output_genes, labels=bool(experiment.loss.de), rates=rates, progress=progress
        )
        loop.truth = truth.to(fabric.device)
    for note in (*precision_notes, *notes, *_notes(line, num_learning, loop, fitted)):
        progress.note(note)
    try:
        if _takes_steps(network):
            with progress.task("adapt", experiment.train.steps, "steps", done=position.step) as advance:
                loop.run(advance)
    except (KeyboardInterrupt, SystemExit):
        progress.note(f"stopped at step {position.step:,}; the same command goes on from there")
        raise
    finally:
        if loop.log is not None:
            loop.log.close()
    if fabric.is_global_zero:
        _finish(run, experiment, line, features, loop, num_learning, fitted)
        for note in _outcome(loop):
            progress.note(note)
    fabric.barrier()
    return out


def _network(run: Run, experiment: Experiment, line: Line, reader: SetReader) -> tuple[StateTransition, int]:
    """Return the run's network with rows for the new line, what learns chosen; and how many numbers learn."""
    spec, weights = grow(
        run.network,
        load_tensors(run.path / WEIGHTS),
        new_contexts=line.num_new_contexts,
        new_batches=line.num_new_batches,
        num_contexts=len(run.contexts),
    )
    if spec != reader.spec:
        raise CheckpointError(
            f"{run.path}: its network is not what its own experiment says ({spec} is not {reader.spec}); "
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
        parse_learn(experiment.adapt.learn),
        contexts=line.contexts,
        batches=line.batches,
        generator=torch.Generator().manual_seed(seed),
    )
    return network, number


def _fit(network: StateTransition, experiment: Experiment, reader: SetReader, effects: TrainingEffects) -> _Fitted:
    """Find what takes no steps, before anything else learns."""
    learn = parse_learn(experiment.adapt.learn)
    return _Fitted(
        gain=fit_shift(network, reader, effects) if learn.gain else None,
        offset_share=fit_offset(network, reader, effects) if learn.offset else None,
    )


def _identity(run_path: Path, experiment: Experiment, store: Store) -> dict[str, Any]:
    """Return what an adaptation must keep to go on."""
    return {
        "adapts": hash_file(run_path / WEIGHTS),
        "learn": experiment.adapt.learn,
        "store": store.fingerprint,
        **training_identity(experiment),
    }


def _notes(line: Line, num_learning: int, loop: Loop, fitted: _Fitted) -> tuple[str, ...]:
    """Return what a user should know, the same at every resumption."""
    total = sum(parameter.numel() for parameter in loop.network.parameters())
    names = ", ".join(line.store.contexts[row] for row in line.contexts)
    notes = [f"{num_learning:,} of {total:,} parameters learn ({num_learning / total:.3%}), for {names}"]
    if fitted.gain is not None:
        notes.append(
            f"what the network adds to control cells is multiplied by {fitted.gain:.3f}, beside the line's mean effect"
        )
    if fitted.offset_share is not None:
        notes.append(
            "the last bias makes good the error on the line's control cells, and of the mean error on its training "
            f"targets beside that, {fitted.offset_share:.3f}"
        )
    if len(loop.val_sets) and not _takes_steps(loop.network):
        notes.append("nothing learns by steps: validation cells are not looked at, and may train as well")
    if not len(loop.val_sets) and _takes_steps(loop.network):
        notes.append("there are no validation cells of the line: nothing says when to stop, the last weights count")
    return tuple(notes)


def _takes_steps(network: torch.nn.Module) -> bool:
    """Return whether anything learns by steps; a gain or an offset alone is found without any."""
    return any(parameter.requires_grad for parameter in network.parameters())


def _outcome(loop: Loop) -> tuple[str, ...]:
    position = loop.position
    if loop.best is None:
        return ()
    if position.best_step == 0:
        return ("no step was better on the held-out cells than none: the weights before the first are kept",)
    return (f"the weights are of step {position.best_step:,}, the best on the held-out cells of the line",)


def _finish(
    run: Run,
    experiment: Experiment,
    line: Line,
    features: PertFeatures,
    loop: Loop,
    num_learning: int,
    fitted: _Fitted,
) -> None:
    position, store = loop.position, line.store
    weights: dict[str, Tensor] = merge(loop.best if loop.best is not None else loop.network.state_dict())
    total = sum(value.numel() for value in weights.values())
    adapted = replace(
        run,
        path=loop.out,
        spec=loop.reader.spec,
        experiment=experiment.as_json(),
        perts=tuple(dict.fromkeys((*run.perts, *store.perts))),
        contexts=store.contexts,
        batches=store.batches,
        scale=store.scale,
        store_path=store.path,
        store_fingerprint=store.fingerprint,
        step=position.best_step if loop.best is not None else position.step,
        metrics={
            "last_step": position.step,
            "val_loss": position.best_loss if loop.best is not None else None,
            "num_parameters": total,
            "num_learning": num_learning,
            "share_learning": num_learning / total,
            "gain": fitted.gain,
            "offset_share": fitted.offset_share,
            "stopped_early": position.step < experiment.train.steps,
        },
        features={**run.features, "filled": features.filled},
        notes=(*run.notes, *_notes(line, num_learning, loop, fitted), *_outcome(loop)),
    )
    save_run(adapted, weights, inputs={"run": hash_file(run.path / WEIGHTS), "store": store.fingerprint})
