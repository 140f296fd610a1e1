"""Networks trained anew, each without some of the training targets, so that every target is met by one that has not.

Invariant: what the run held out to validate or to test stays out of every fold, on both sides.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pertcast.config import Experiment, FewshotConfig, rebuild_experiment
from pertcast.data.split import Split
from pertcast.data.store import Store, prepare
from pertcast.errors import CheckpointError, ConfigError
from pertcast.models.checkpoint import open_run
from pertcast.progress import Progress
from pertcast.stats.draws import generator
from pertcast.train import train

__all__ = ["refit"]


def refit(
    run_path: Path, store_path: Path, *, folds: int, steps: int | None, progress: Progress
) -> list[tuple[Path, Path]]:
    """Train a network for each fold, beside the run; what is trained already is left as it is.

    Returns
    -------
    The folds' runs, each with its store.

    Raises
    ------
    ConfigError
        If there are fewer training targets than folds, or fewer than two folds.
    CheckpointError
        If the run was adapted from another.
    """
    run, store = open_run(run_path), Store.open(store_path)
    if "num_learning" in run.metrics:
        raise CheckpointError(
            f"{run_path}: it was adapted from another run, and folds train from the start; leave --folds away"
        )
    experiment = rebuild_experiment(run.experiment, place=run_path / "run.json")
    trained = np.unique(store.pert_codes[(store.split & Split.TRAIN) != 0])
    targets = sorted(store.perts[code] for code in trained if code != store.control_code)
    if not 2 <= folds <= len(targets):
        raise ConfigError(f"--folds: expected 2 to {len(targets)}, the number of training targets, got {folds}")
    order = generator(experiment.train.seed, "calibrate", "folds").permutation(len(targets))
    base = run_path.with_name(f"{run_path.name}_folds")
    pairs = []
    for fold in range(folds):
        held = {targets[place] for place in order[fold::folds]}
        ours = _without(experiment, store, held)
        if steps is not None:
            ours = ours.model_copy(update={"train": ours.train.model_copy(update={"steps": steps})})
        progress.note(f"fold {fold + 1} of {folds}: without {len(held)} of {len(targets)} training targets")
        place = prepare(ours, base / f"store_{fold}", progress=progress)
        pairs.append((train(ours, place, base / f"run_{fold}", progress=progress), place))
    return pairs


def _without(experiment: Experiment, store: Store, held: set[str]) -> Experiment:
    """Return the experiment with some targets validating, and all that validated or tested out of the way."""
    fewshot = {}
    used = (store.split & Split.TRAIN) != 0
    pairs = np.unique(np.stack([store.dataset_codes[used], store.context_codes[used]]), axis=1).T
    for dataset, context in pairs.tolist():
        rows = (store.dataset_codes == dataset) & (store.context_codes == context)
        flags = store.split[rows]
        labels = {flag: _names(store, store.pert_codes[rows][(flags & flag) != 0]) for flag in Split}
        training = labels[Split.TRAIN]
        # cells of a training target may validate (prepare.holdout_cells)
        others = (labels[Split.VAL] | labels[Split.TEST]) - training
        if training:
            key = f"{store.datasets[dataset]}.{store.contexts[context]}"
            fewshot[key] = FewshotConfig(val=tuple(sorted(held & training)), test=tuple(sorted(others)))
    zeroshot = {key: "test" if split != "train" else split for key, split in experiment.zeroshot.items()}
    kept = {key: split for key, split in zeroshot.items() if key not in fewshot}
    return experiment.model_copy(update={"fewshot": fewshot, "zeroshot": kept})


def _names(store: Store, codes: np.ndarray) -> set[str]:
    return {store.perts[code] for code in np.unique(codes)} - {store.control}
