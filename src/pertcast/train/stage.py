"""The training stage: open what goes in, go on where an earlier run stopped, and write the run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor

from pertcast.config import Experiment, rebuild_experiment
from pertcast.data.counts_fit import BatchEffects, batch_effects
from pertcast.data.de_labels import de_labels
from pertcast.data.features import PertFeatures, save_features
from pertcast.data.prepare import require_same_store
from pertcast.data.store import Store
from pertcast.errors import CheckpointError, ConfigError, DataError
from pertcast.files.artefacts import MANIFEST, any_content, claimed, read_json, remove_leftovers, write_json
from pertcast.models.baselines import save_baseline
from pertcast.models.run_folder import BASE, RUN_JSON, WEIGHTS, open_run, save_run
from pertcast.models.state import StateTransition
from pertcast.processes import launched, run_processes
from pertcast.progress import SILENT, Progress
from pertcast.stats.draws import key_hash
from pertcast.train.baseline import TrainingBase, fit_base, train_baseline
from pertcast.train.batches import SetReader
from pertcast.train.checkpoints import (
    IDENTITY,
    MetricsLog,
    Position,
    identity_of,
    identity_problems,
    load_newest,
    restore,
    with_defaults,
)
from pertcast.train.control_counts import ControlRates, control_rates
from pertcast.train.devices import is_first_process, num_processes, one_process_for_all, open_fabric, products
from pertcast.train.loop import Loop, make_optimizer
from pertcast.train.loss_targets import Truth, learn_truth
from pertcast.train.loss_terms import needs_truth
from pertcast.train.precision import require_one_precision, resolve_precision
from pertcast.train.run_record import FEATURES, run_features, run_of, show_coverage
from pertcast.train.validation import OfficialMetrics


class Facts(NamedTuple):
    """What a user should know of the training cells, the same at every resumption."""

    notes: tuple[str, ...]
    batches: BatchEffects | None


def learn_facts(reader: SetReader, loop: Loop, features: PertFeatures, store: Store) -> Facts:
    """Return what a user should know before the first step."""
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
    batches = batch_effects(store)
    if batches is not None:
        notes.append(str(batches))
    return Facts(tuple(notes), batches)


def finish_run(
    out: Path,
    experiment: Experiment,
    store: Store,
    features: PertFeatures,
    loop: Loop,
    facts: Facts,
    weights: dict[str, Tensor],
) -> None:
    """Write the trained run: weights, and everything that generation needs to know."""
    position = loop.position
    has_best = loop.best is not None
    if loop.reader.spec.unknown_batch:
        rows = weights["batch_encoder.weight"].clone()
        rows[loop.reader.untrained_batches] = rows[-1].clone()
        weights = {**weights, "batch_encoder.weight": rows}
    run = run_of(
        out,
        loop.reader.spec,
        experiment,
        store,
        features,
        output_genes=loop.reader.output_genes,
        step=position.best_step if has_best else position.step,
        metrics={
            "last_step": position.step,
            "val_loss": position.best_loss if has_best else None,
            "selected_by": experiment.train.select_by if has_best else None,
            "num_parameters": sum(parameter.numel() for parameter in loop.network.parameters()),
            "stopped_early": position.step < experiment.train.steps,
            "batch_effects": facts.batches._asdict() if facts.batches else None,
        },
        notes=facts.notes,
    )
    save_run(run, weights, inputs={"store": store.fingerprint})


METRICS = "metrics.jsonl"


def train(experiment: Experiment, store_path: Path, out: Path, *, progress: Progress = SILENT) -> Path:
    """Train a State Transition network on a store, or fit the baseline that ``model.kind`` names.

    A run that was stopped, however, goes on from its newest checkpoint and ends with the weights of a run that was
    never stopped. A finished run is left as it is, unless `train.steps` has become larger.

    Parameters
    ----------
    experiment
        The sections features, model, loss and train say how; ``submission.targets``, where given, which perturbations
        must have features.
    store_path
        What :func:`pertcast.data.store.prepare` wrote.
    out
        The run's folder: weights.safetensors (of the best validated step where there are validation sets, else of the
        last), run.json, features/, metrics.jsonl, checkpoints/, and base/ where the network stands on a baseline.
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
                f'[train] strategy: "fsdp" shares out a network, and model.kind = "{experiment.model.kind}" is none; '
                "leave train.strategy out"
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
    with claimed(out) if is_first_process() else nullcontext(), one_process_for_all(num), products(experiment.train):
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
    fabric = open_fabric(experiment.train, out, some_unused=experiment.model.input.startswith("obsm:"))
    require_one_precision(fabric, experiment.train.precision)
    if not fabric.is_global_zero:
        progress = SILENT
    features = run_features(experiment, store, out)
    reader = SetReader(store, experiment, features, sparse=fabric.device.type == "cuda")
    if experiment.model.base != "none":
        size = reader.spec.set_size
        reader.base = fit_base(
            experiment.model.base, store, features, output_genes=reader.output_genes, set_size=size, progress=progress
        )
    official = None
    if experiment.train.select_by != "loss":
        official = OfficialMetrics(store, reader, experiment.train, progress=progress)
    rates = control_rates(store, reader.output_genes) if experiment.loss.nb else None
    network = _new_network(reader, store, experiment, features, rates)
    compiled: Any = torch.compile(network) if experiment.train.compile else network
    model = fabric.setup_module(compiled)
    # after the network is set up: its parameters may have become shards
    optimizer = make_optimizer(network, experiment.train, fabric.device)
    stepper = fabric.setup_optimizers(optimizer)
    saved, notes = fabric.broadcast(load_newest(out) if fabric.is_global_zero else (None, []))
    best = restore(saved, model=network, optimizer=optimizer) if saved else None
    position = saved.position if saved else Position()
    fabric.barrier()
    if fabric.is_global_zero:
        begin_run(out, identity, features, base=reader.base)
    for note in notes:
        progress.note(note)
    log = MetricsLog(out / METRICS, position) if fabric.is_global_zero else None
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
        log=log,
        official=official,
        # where no step is better on held-out perturbations, the baseline stays
        validates_first=reader.base is not None,
    )
    if needs_truth(experiment.loss):
        loop.truth = _learn_truth(store, reader, experiment, fabric, rates, progress)
    facts = learn_facts(reader, loop, features, store)
    show_coverage(features, store, experiment, progress)
    for note in facts.notes:
        progress.note(note)
    try:
        with progress.task("train", experiment.train.steps, "steps", done=position.step) as advance:
            loop.run(advance)
    except (KeyboardInterrupt, SystemExit):
        progress.note(f"stopped at step {position.step:,}; the same command goes on from there")
        raise
    finally:
        if log is not None:
            log.close()
    weights = loop.kept_weights()
    if fabric.is_global_zero:
        finish_run(out, experiment, store, features, loop, facts, weights)
    fabric.barrier()
    return out


def _learn_truth(
    store: Store,
    reader: SetReader,
    experiment: Experiment,
    fabric: Fabric,
    rates: ControlRates | None,
    progress: Progress,
) -> Truth:
    """Return what is known of the training split; the first process computes and keeps labels, the others read them."""
    if experiment.loss.de and fabric.is_global_zero:
        de_labels(store, progress=progress)
    fabric.barrier()
    truth = learn_truth(store, reader.output_genes, labels=bool(experiment.loss.de), rates=rates, progress=progress)
    return truth.to(fabric.device)


def require_losses(experiment: Experiment) -> None:
    """Refuse a loss without terms; that of the counts head says nothing of the output."""
    loss, is_latent = experiment.loss, experiment.model.input.startswith("obsm:")
    if not (loss.energy or loss.mae or loss.de or loss.rank or (is_latent and loss.decoder)):
        raise ConfigError("[loss]: every term is switched off; give loss.energy a weight above 0")


def require_same_run(out: Path, identity: dict[str, Any]) -> None:
    """Refuse a folder that holds something else, or a run that was begun otherwise."""
    if not any_content(out):
        return
    if not (out / IDENTITY).is_file():
        raise DataError(f"{out}: it is there already and holds no run; give another --out, or remove it first")
    problems = identity_problems(with_defaults(read_json(out / IDENTITY)), identity)
    if problems:
        raise CheckpointError(
            f"{out}: it holds a run that was begun otherwise; give another --out, or remove the folder to train anew",
            problems=problems,
        )


def is_finished(out: Path, steps: int) -> bool:
    """Return whether a folder holds a run that needs no more steps; refuse one that has taken more than these."""
    if not (out / MANIFEST).is_file():
        return False
    metrics = open_run(out).metrics
    if metrics["last_step"] > steps:
        raise CheckpointError(
            f"{out}: expected train.steps of at least {metrics['last_step']:,}, which it is trained for already, "
            f"got {steps:,}; raise train.steps, or give another --out"
        )
    return bool(metrics["last_step"] == steps or metrics["stopped_early"])


def _new_network(
    reader: SetReader, store: Store, experiment: Experiment, features: PertFeatures, rates: ControlRates | None
) -> StateTransition:
    seed = key_hash(experiment.train.seed, "init") % 2**63
    network = StateTransition(reader.spec, generator=torch.Generator().manual_seed(seed))
    if reader.spec.shift:
        network.set_control_feature(torch.from_numpy(features.of([store.control])[0]))
    else:
        network.start_at_mean(torch.from_numpy(store.control_mean_log1p[reader.output_genes]))
    if experiment.loss.de and experiment.loss.de_head == "learned":
        network.add_de_head()
    if rates is not None:
        network.add_counts_head(torch.from_numpy(rates.log_shape_G))
    return network


def begin_run(out: Path, identity: dict[str, Any], features: PertFeatures, *, base: TrainingBase | None = None) -> None:
    """Write what a run is begun with, and take away what an earlier one ended with."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, RUN_JSON, MANIFEST, IDENTITY, METRICS):
        remove_leftovers(out / name)
    write_json(out / IDENTITY, identity)
    if not (out / FEATURES / "features.json").is_file():
        save_features(features, out / FEATURES)
    if base is not None:
        save_baseline(base.baseline, out / BASE)
