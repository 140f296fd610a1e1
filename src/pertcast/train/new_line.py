"""Align a new cell line's experiment and store with a trained run.

Invariant: everything that does not fit the run (genes, control label, scale, model, features) is refused, all problems
at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pertcast.config import Experiment, rebuild_experiment
from pertcast.data.features import PertFeatures, load_features, open_features
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import CheckpointError, ConfigError, DataError, Problem
from pertcast.models.run_folder import Run, open_run

_SAME_TOTAL = 0.01
_ALONE = {"devices": 1, "num_nodes": 1, "strategy": "auto"}


def adapted_experiment(run_path: Path, experiment: Experiment) -> Experiment:
    """Return the experiment of an adaptation: its own cells, with the run's model and features.

    The loss and ``[train]`` are the run's, too, where the experiment says nothing of them; cells are normalised to the
    run's total. Weights do not decay, and auxiliary terms of the loss do not rise slowly: the network is trained
    already.

    Parameters
    ----------
    run_path
        A folder that :func:`pertcast.train.train` wrote.
    experiment
        Of the new line.

    Raises
    ------
    ConfigError
        If it asks for another model than the run's, or for a sharded one.
    CheckpointError
        If the run was imported: it has no store, and so neither genes nor a scale to hold new cells against.
    """
    run = open_run(run_path)
    if not run.store_fingerprint:
        raise CheckpointError(
            f"{run_path}: it was imported and has no training store; train a run with `pertcast train`, and adapt that"
        )
    path = experiment.features.path
    moved = [] if path is None else [f"features.path={str(path)!r}"]
    trained = rebuild_experiment(run.experiment, moved, place=run_path / "run.json")
    given = experiment.model_fields_set
    _require_same_model(run_path, experiment, trained)
    if "train" in given and experiment.train.strategy == "fsdp":
        raise ConfigError('[train] strategy: an adaptation runs in one process, got "fsdp"; remove train.strategy')
    train = experiment.train if "train" in given else trained.train
    speed = experiment.adapt.model_dump(include={"steps", "learning_rate", "val_every", "patience"})
    loss = experiment.loss if "loss" in given else trained.loss
    update: dict[str, Any] = {
        "model": trained.model.model_copy(update={"context_embedding": True}),
        "features": trained.features,
        "loss": loss.model_copy(update={"warmup_steps": 0}),
        "train": train.model_copy(update={**speed, **_ALONE, "weight_decay": 0.0}),
    }
    if run.target_sum is not None and experiment.prepare.target_sum == "median":
        update["prepare"] = experiment.prepare.model_copy(update={"target_sum": run.target_sum})
    return experiment.model_copy(update=update)


def _require_same_model(run_path: Path, experiment: Experiment, trained: Experiment) -> None:
    """Refuse model settings that differ from the run's."""
    if "model" not in experiment.model_fields_set:
        return
    problems = []
    for name in sorted(experiment.model.model_fields_set - {"context_embedding"}):
        ours, theirs = getattr(experiment.model, name), getattr(trained.model, name)
        if ours != theirs:
            problems.append(Problem(f"[model] {name}", f"the run was trained with {theirs!r}, got {ours!r}"))
    if problems:
        raise ConfigError(
            f"{run_path}: an adapted network keeps its shape; leave [model] out of the new line's experiment",
            problems=problems,
        )


@dataclass(frozen=True)
class AlignedStore:
    """A store whose codes are the rows of the run's embeddings, new ones after the known."""

    store: Store  # The view
    num_new_contexts: int  # Rows that the run lacks
    num_new_batches: int
    contexts: tuple[int, ...]  # Rows that may learn: contexts with training cells, and batches that are new
    batches: tuple[int, ...]


def bring_into_run(run: Run, store: Store) -> AlignedStore:
    """Align a store with a run."""
    contexts = (*run.contexts, *(name for name in store.contexts if name not in run.contexts))
    batches = (*run.batches, *(name for name in store.batches if name not in run.batches))
    context_rows = np.array([contexts.index(name) for name in store.contexts], dtype=np.int32)
    # the last is the unknown batch, whose code is -1
    batch_rows = np.array([*(batches.index(name) for name in store.batches), -1], dtype=np.int32)
    view = replace(
        store,
        contexts=contexts,
        context_codes=context_rows[store.context_codes],
        batches=batches,
        batch_codes=batch_rows[store.batch_codes],
        hvg=run.hvg,
    )
    trained = np.unique(view.context_codes[(view.split & Split.TRAIN) != 0])
    return AlignedStore(
        view,
        num_new_contexts=len(contexts) - len(run.contexts),
        num_new_batches=len(batches) - len(run.batches),
        contexts=tuple(trained.tolist()),
        batches=tuple(range(len(run.batches), len(batches))),
    )


def require_fitting(run: Run, store: Store) -> None:
    """Refuse a store with other genes, control label or scale than the run's."""
    problems = []
    if store.genes != run.genes:
        differs = next((n for n, (a, b) in enumerate(zip(run.genes, store.genes, strict=False)) if a != b), None)
        what = f"{len(run.genes):,} genes expected, {len(store.genes):,} there"
        if differs is not None:
            what += f"; position {differs}: expected {run.genes[differs]!r}, got {store.genes[differs]!r}"
        remedy = "prepare it with the gene list of the run's own store (submission.genes)"
        problems.append(Problem("genes", what, remedy))
    if store.control != run.control:
        message = f"the run's control label is {run.control!r}, the store's is {store.control!r}"
        problems.append(Problem("controls", message, f"rename the label to {run.control!r} in the cells"))
    if not _same_total(run.target_sum, store.target_sum):
        message = f"the run's cells were normalised to {run.target_sum}, the store's to {store.target_sum}"
        remedy = "prepare it from counts, or from cells that were normalised so"
        problems.append(Problem("scale", message, remedy))
    if problems:
        raise DataError(f"{store.path}: the store does not fit the run {run.path}", problems=problems)


def _same_total(ours: float | None, theirs: float | None) -> bool:
    if ours is None or theirs is None:
        return ours == theirs
    return abs(ours - theirs) <= _SAME_TOTAL * ours


def line_features(run: Run, experiment: Experiment, store: Store) -> PertFeatures:
    """Return the run's features, and those of new perturbations from the file that it was trained with."""
    kept = open_features(run.path / "features")
    lacking = [name for name in store.perts if name not in kept.names]
    if not lacking:
        return kept
    if kept.kind != "file":
        kept.of(lacking)  # names every one
    found = load_features(experiment.features, store)
    shared = [name for name in store.perts if name in kept.names]
    if not np.array_equal(found.of(shared), kept.of(shared)):
        raise CheckpointError(
            f"{run.path}: {found.source} gives perturbations other features than it was trained with; "
            "give the file of the training with --set features.path=..."
        )
    return replace(
        kept,
        names=(*kept.names, *lacking),
        matrix=np.concatenate([kept.matrix, found.of(lacking)]),
        filled={**kept.filled, **{name: how for name, how in found.filled.items() if name in lacking}},
    )
