"""One trial of a comparison: train a candidate with one seed on one fold, generate the held-out cells, score them.

Trials run the normal pipeline, so they score what would be submitted. Finished trials are reused, and interrupted ones
resume.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pertcast.config import Experiment
from pertcast.data.store import Store
from pertcast.files.artefacts import manifest_path, read_json, write_json
from pertcast.ladder.held_out import HeldOut, Scores, against_truth
from pertcast.ladder.scored_side import read_side
from pertcast.progress import SILENT, Progress
from pertcast.seasons import Season
from pertcast.seasons import season as season_of

_SCORES = "scores.json"
_FORMAT = 1


@dataclass(frozen=True)
class Trial:
    """Everything one trial needs; it travels to worker processes."""

    name: str  # The candidate, and which of its trials this is
    fold: int
    seed: int
    experiment: Experiment  # Resolved, with the fold's held-out perturbations and the seed
    store: Path  # The fold's store
    held_out: tuple[HeldOut, ...]  # Its truth, one for each context
    season: str  # Whose metrics
    out: Path  # The trial's folder

    @property
    def rules(self) -> Season:
        """The season's rules."""
        return season_of(self.season)

    @property
    def title(self) -> str:
        """Its name in the progress."""
        return f"{self.name}, fold {self.fold}, seed {self.seed}"


def digest_of(*parts: Any) -> str:
    """Return a short name for JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def run_trial(trial: Trial, *, progress: Progress = SILENT) -> Scores:
    """Run the unfinished parts of a trial, and return its scores."""
    key = _key(trial)
    kept = trial.out / _SCORES
    if kept.is_file():
        found = read_json(kept)
        if found.get("key") == key:
            return found["scores"]
    from pertcast.train import train

    run = train(trial.experiment, trial.store, trial.out / "run", progress=progress)
    scores = {held.name: _score(trial, held, run, progress) for held in trial.held_out}
    write_json(kept, {"key": key, "name": trial.name, "fold": trial.fold, "seed": trial.seed, "scores": scores})
    return scores


def _key(trial: Trial) -> str:
    truths = [[held.name, list(held.tested), held.num_cells] for held in trial.held_out]
    return digest_of(_FORMAT, trial.experiment.as_json(), Store.open(trial.store).fingerprint, truths)


def _score(trial: Trial, held: HeldOut, run: Path, progress: Progress) -> dict[str, dict[str, float]]:
    from pertcast.generate import generate
    from pertcast.submission.assemble import assemble

    place = trial.held_out.index(held)
    parts, cells = trial.out / f"parts-{place}", trial.out / f"prediction-{place}.h5ad"
    generate(run, parts, experiment=_asking_for(trial, held), store_path=trial.store, progress=progress)
    assemble(parts, cells, progress=progress)
    predicted = read_side(cells, trial.rules, progress=progress)
    scored = against_truth(predicted, read_side(held.truth, trial.rules, cache=held.truth.parent, progress=progress))
    shutil.rmtree(parts)
    for path in (cells, manifest_path(cells)):
        path.unlink(missing_ok=True)
    return scored


def _asking_for(trial: Trial, held: HeldOut) -> Experiment:
    """Return the experiment that requests the fold's targets beside the truth's control cells."""
    rules = {
        "num_genes": len(Store.open(trial.store).genes),
        "num_targets": len(held.tested),
        "max_cells": held.num_cells,
        "control_label": trial.rules.control_label,
    }
    submission = trial.experiment.submission.model_copy(
        update={
            "season": trial.rules.name,
            "targets": held.targets,
            "dataset": held.dataset,
            "context": held.context,
            "controls": "copied",
            "num_controls": held.num_controls,
            "rules": rules,
        }
    )
    return trial.experiment.model_copy(update={"submission": submission})
