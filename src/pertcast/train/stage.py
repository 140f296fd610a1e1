"""Train a model: resolve what the training needs, run the loop, and write the run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pertcast.config import Experiment, rebuild_experiment
from pertcast.data.counts_fit import batch_effects
from pertcast.data.prepare import require_same_store
from pertcast.data.store import Store
from pertcast.errors import ConfigError
from pertcast.files.artefacts import claimed
from pertcast.files.resources import reused_memory
from pertcast.models.run_folder import save_run
from pertcast.models.state import StateTransition
from pertcast.processes import launched, run_processes
from pertcast.progress import SILENT, Progress
from pertcast.stats.draws import key_hash
from pertcast.train.baseline import fit_base, train_baseline
from pertcast.train.batches import SetReader
from pertcast.train.checkpoints import identity_of, is_finished, require_same_run
from pertcast.train.control_counts import control_rates
from pertcast.train.devices import is_first_process, num_processes, one_process_for_all, open_fabric, products
from pertcast.train.loop import Loop, TrainingPlan
from pertcast.train.precision import require_one_precision, resolve_precision
from pertcast.train.run_record import run_features, run_of, show_coverage
from pertcast.train.validation import OfficialMetrics


def train(experiment: Experiment, store_path: Path, out: Path, *, progress: Progress = SILENT) -> Path:
    """Train a State Transition network on a store, or fit the baseline that ``model.kind`` names.

    An interrupted run resumes from its latest checkpoint and ends with the same weights as an
    uninterrupted one. A finished run is left as it is, unless `train.steps` has become larger.

    Parameters
    ----------
    experiment
        The sections features, model, loss and train say how; ``submission.targets``, where given, which perturbations
        must have features.
    store_path
        What :func:`pertcast.data.store.prepare` wrote.
    out
        The run's folder: weights.safetensors (of the best validated step where there are validation sets, else of the
        last), run.json, features/, metrics.jsonl, checkpoints/, and base/ if the network has a baseline.
    progress
        Where steps, loss and notes are told.

    Returns
    -------
    `out`.

    Raises
    ------
    ConfigError, DataError
        If the experiment and the store do not fit one another.
    CheckpointError
        If `out` holds a run that was begun otherwise, or training diverges.
    """
    if experiment.model.kind != "state":
        if experiment.train.strategy == "fsdp":
            raise ConfigError(
                f'[train] strategy: "fsdp" shards a network, but model.kind = "{experiment.model.kind}" is a baseline; '
                "remove train.strategy"
            )
        # one process is enough, whatever was asked for
        if is_first_process():
            with claimed(out):
                store = Store.open(store_path)
                require_same_store(store, experiment, store.config)
                train_baseline(experiment, store, out, progress=progress)
        return out
    experiment, precision_notes = resolve_precision(experiment, out)
    for note in precision_notes if is_first_process() else ():
        progress.note(note)
    num = num_processes(experiment.train)
    if num > 1 and launched() is None:
        job = {"experiment": experiment.as_json(), "store": str(store_path), "out": str(out)}
        run_processes("pertcast.train.stage:train_share", job, num=num, progress=progress)
        return out
    mine = claimed(out) if is_first_process() else nullcontext()
    with mine, one_process_for_all(num), products(experiment.train), reused_memory():
        return _train(experiment, store_path, out, progress)


def train_share(job: Mapping[str, Any], progress: Progress) -> None:
    """Train as one of the processes that :func:`train` started."""
    experiment = rebuild_experiment(job["experiment"], place=Path(job["out"]))
    train(experiment, Path(job["store"]), Path(job["out"]), progress=progress)


def _train(experiment: Experiment, store_path: Path, out: Path, progress: Progress) -> Path:
    store = Store.open(store_path)
    require_same_store(store, experiment, store.config)
    require_losses(experiment)
    identity = identity_of(experiment, store.fingerprint)
    require_same_run(out, identity)
    if is_finished(out, experiment.train.steps):
        progress.note(f"{out}: already trained for {experiment.train.steps:,} steps")
        return out
    plan = _resolve(experiment, store, out, identity, progress)
    if not plan.fabric.is_global_zero:
        progress = SILENT
    loop = Loop(plan, progress)
    show_coverage(plan.features, store, experiment, progress)
    batches = batch_effects(store)
    notes = (*_notes(plan, loop), *([str(batches)] if batches is not None else []))
    for note in notes:
        progress.note(note)
    loop.take_steps("train", progress)
    weights = loop.kept_weights()
    if plan.fabric.is_global_zero:
        _write_run(plan, loop, weights, notes, None if batches is None else batches._asdict())
    plan.fabric.barrier()
    return out


def _resolve(
    experiment: Experiment, store: Store, out: Path, identity: dict[str, Any], progress: Progress
) -> TrainingPlan:
    """Resolve devices, features, the base, the loss targets and the network."""
    fabric = open_fabric(experiment.train, out, some_unused=experiment.model.input.startswith("obsm:"))
    require_one_precision(fabric, experiment.train.precision)
    if not fabric.is_global_zero:
        progress = SILENT
    features = run_features(experiment, store, out)
    reader = SetReader(store, experiment, features)
    genes, kind = reader.output_genes, experiment.model.base
    if kind != "none":
        size = reader.spec.set_size
        reader.base = fit_base(kind, store, features, output_genes=genes, set_size=size, progress=progress)
    official = None
    if experiment.train.select_by != "loss":
        official = OfficialMetrics(store, reader, experiment.train, progress=progress)
    rates = control_rates(store, genes) if experiment.loss.nb else None
    seed = key_hash(experiment.train.seed, "init") % 2**63
    network = StateTransition(reader.spec, generator=torch.Generator().manual_seed(seed))
    if reader.spec.shift:
        network.set_control_feature(torch.from_numpy(features.of([store.control])[0]))
    else:
        network.start_at_mean(torch.from_numpy(store.control_mean_log1p[genes]))
    if experiment.loss.de and experiment.loss.de_head == "learned":
        network.add_de_head()
    if rates is not None:
        network.add_counts_head(torch.from_numpy(rates.log_shape_G))
    return TrainingPlan(
        experiment=experiment,
        store=store,
        out=out,
        identity=identity,
        fabric=fabric,
        features=features,
        reader=reader,
        network=network,
        rates=rates,
        official=official,
        # if no step is better on held-out perturbations, the baseline stays
        validates_first=reader.base is not None,
    )


def _notes(plan: TrainingPlan, loop: Loop) -> list[str]:
    """Return what a user should know of the training cells, the same at every resumption."""
    reader, features = plan.reader, plan.features
    sets = reader.training(0)
    size = reader.spec.set_size
    notes = []
    if sets.num_repeating:
        notes.append(f"{sets.num_repeating:,} training groups have fewer than {size} cells, which repeat in a set")
    for number, place, other in (
        (sets.num_other_batch, "batch", "batch of the same file"),
        (sets.num_other_file, "file", "file of the same dataset"),
        (sets.num_other_dataset, "dataset", 'dataset, as train.match = "all_datasets" allows'),
    ):
        if number:
            notes.append(
                f"{number:,} training cells have no control in their own {place}; "
                f"each is paired with one of another {other}"
            )
    if not len(loop.val_sets):
        notes.append("there are no validation cells: the last weights are kept, not the best")
    if reader.spec.unknown_batch and len(reader.untrained_batches):
        notes.append(
            f"{len(reader.untrained_batches):,} batches have no training cells: they get the row of the unknown batch"
        )
    if features.filled:
        notes.append(f"{len(features.filled):,} perturbations have a feature that was filled in")
    return notes


def _write_run(
    plan: TrainingPlan, loop: Loop, weights: dict[str, Tensor], notes: tuple[str, ...], batches: dict[str, Any] | None
) -> None:
    """Write the trained run: weights, and everything that generation needs."""
    reader, state, has_best = plan.reader, loop.state, loop.best is not None
    if reader.spec.unknown_batch:
        rows = weights["batch_encoder.weight"].clone()
        rows[reader.untrained_batches] = rows[-1].clone()
        weights = {**weights, "batch_encoder.weight": rows}
    metrics = {
        "last_step": state.step,
        "val_loss": state.best_loss if has_best else None,
        "selected_by": loop.train.select_by if has_best else None,
        "num_parameters": sum(parameter.numel() for parameter in loop.network.parameters()),
        "stopped_early": state.step < loop.train.steps,
        "batch_effects": batches,
    }
    run = run_of(plan.out, reader.spec, plan.experiment, plan.store, plan.features, reader.output_genes)
    run = replace(run, step=state.best_step if has_best else state.step, metrics=metrics, notes=notes)
    save_run(run, weights, inputs={"store": plan.store.fingerprint})


def require_losses(experiment: Experiment) -> None:
    """Raise if every term that trains the output is off. ``loss.nb`` does not count."""
    loss, is_latent = experiment.loss, experiment.model.input.startswith("obsm:")
    if not (loss.energy or loss.mae or loss.de or loss.rank or (is_latent and loss.decoder)):
        raise ConfigError("[loss]: every term is switched off; give loss.energy a weight above 0")
