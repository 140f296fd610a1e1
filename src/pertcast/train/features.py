"""The perturbation features of a run: those that it was begun with, or what the experiment says; their coverage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pertcast.config import Experiment
from pertcast.data.features import PertFeatures, coverage, load_features, open_features
from pertcast.data.store import Store
from pertcast.files.season_lists import read_targets
from pertcast.progress import Progress

__all__ = ["FEATURES", "feature_facts", "needs_features", "run_features", "show_coverage"]

FEATURES = "features"


def needs_features(experiment: Experiment) -> bool:
    """Return whether what learns looks at features; a control copy and the mean effect do not."""
    return experiment.model.kind not in ("control", "mean")


def run_features(experiment: Experiment, store: Store, out: Path) -> PertFeatures:
    """Return a run's features: those that it was begun with, else as the experiment says, for its targets too.

    Raises
    ------
    DataError
        Naming every label without a feature.
    """
    if (out / FEATURES / "features.json").is_file():
        return open_features(out / FEATURES)
    targets = _targets(experiment)
    if needs_features(experiment):
        return load_features(experiment.features, store, targets=targets)
    names = tuple(dict.fromkeys((store.control, *store.perts, *targets)))
    nothing = np.zeros((len(names), 0), dtype=np.float32)
    return PertFeatures(names, nothing, kind="none", control=store.control, source="no features are looked at")


def feature_facts(features: PertFeatures) -> dict[str, Any]:
    """Return what a run tells of its features: kind, source, width, and what was filled in."""
    return {"kind": features.kind, "source": features.source, "dim": features.dim, "filled": features.filled}


def show_coverage(features: PertFeatures, store: Store, experiment: Experiment, progress: Progress) -> None:
    """Show how many training perturbations, held-out ones and targets have a feature of their own."""
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
