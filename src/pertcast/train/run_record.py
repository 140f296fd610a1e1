"""The record of a run, and its features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pertcast.config import STORE_KEYS, Experiment
from pertcast.data.features import PertFeatures, coverage, load_features, open_features
from pertcast.data.store import Store
from pertcast.files.season_lists import read_targets
from pertcast.models.baselines import BaselineSpec
from pertcast.models.run_folder import Run
from pertcast.models.spec import StateSpec
from pertcast.progress import Progress
from pertcast.train.checkpoints import FEATURES


def needs_features(experiment: Experiment) -> bool:
    """Return whether the model reads features; a control copy and the mean effect do not."""
    return experiment.model.kind not in ("control", "mean")


def run_features(experiment: Experiment, store: Store, out: Path) -> PertFeatures:
    """Return a run's features: those it started with, else the experiment's, for its targets too."""
    if (out / FEATURES / "features.json").is_file():
        return open_features(out / FEATURES)
    targets = _targets(experiment)
    if needs_features(experiment):
        return load_features(experiment.features, store, targets=targets)
    names = tuple(dict.fromkeys((store.control, *store.perts, *targets)))
    nothing = np.zeros((len(names), 0), dtype=np.float32)
    return PertFeatures(names, nothing, kind="none", control=store.control, source="no features are looked at")


def show_coverage(features: PertFeatures, store: Store, experiment: Experiment, progress: Progress) -> None:
    """Show how many training perturbations, held-out ones and targets have their own feature."""
    if not needs_features(experiment):
        return
    rows = coverage(features, store, _targets(experiment))
    table = [[row.group, f"{row.covered:,}", f"{row.filled:,}", f"{row.total:,}"] for row in rows if row.total]
    progress.table(f"Perturbation features: {features.source}", ["", "own feature", "filled in", "all"], table)


def _targets(experiment: Experiment) -> tuple[str, ...]:
    submission = experiment.submission
    if submission.targets is None:
        return ()
    return tuple(read_targets(submission.targets, submission.resolve()))


def run_of(
    out: Path,
    spec: StateSpec | BaselineSpec,
    experiment: Experiment,
    store: Store,
    features: PertFeatures,
    output_genes: NDArray[np.int64],
) -> Run:
    """Return the record of a model trained on a store, at step 0 and without metrics; nothing is written."""
    return Run(
        path=out,
        spec=spec,
        # as the store was made: its files may be elsewhere by now
        experiment={**experiment.as_json(), **{key: store.config[key] for key in STORE_KEYS if "." not in key}},
        genes=store.genes,
        output_genes=output_genes,
        hvg=store.hvg,
        perts=store.perts,
        contexts=store.contexts,
        batches=store.batches,
        control=store.control,
        target_sum=store.target_sum,
        scale=store.scale,
        store_path=store.path,
        store_fingerprint=store.fingerprint,
        step=0,
        features={"kind": features.kind, "source": features.source, "dim": features.dim, "filled": features.filled},
    )
