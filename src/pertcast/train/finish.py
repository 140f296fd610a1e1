"""What a training ends with: the run's files, and what its user should know of the cells that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from pertcast.config import Experiment
from pertcast.data.batch_effects import BatchEffects, batch_effects
from pertcast.data.features import PertFeatures
from pertcast.data.store import Store
from pertcast.models.checkpoint import save_run
from pertcast.train.batches import SetReader
from pertcast.train.loop import Loop
from pertcast.train.record import run_of

__all__ = ["Facts", "finish_run", "learn_facts"]


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
    """Write the trained run: weights, and everything that generation needs to know.

    Parameters
    ----------
    out
        The run's folder.
    experiment, store, features, loop, facts
        What it was trained with, and how training went.
    weights
        Whole tensors of the best validated step, or of the last.
    """
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
