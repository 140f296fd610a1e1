"""Fit a baseline on the training split, as a run or as the base of a network.

Invariant: held-out cells are never read. In training, a perturbation's base is the baseline's prediction with this
perturbation (in its context) left out; otherwise the network would find nothing left to learn. Shapes: B sets, N
training perturbations (each in its context), G predicted genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pertcast.config import Experiment
from pertcast.data.cell_sets import CellSets
from pertcast.data.features import PertFeatures, save_features
from pertcast.data.store import Store
from pertcast.errors import DataError
from pertcast.files.artefacts import MANIFEST, write_json
from pertcast.models.baselines import Baseline, BaselineKind, Examples, examples_of, fit_baseline, predict_effects
from pertcast.models.baselines.predict import arrays_of
from pertcast.models.run_folder import save_run
from pertcast.models.spec import set_size_of
from pertcast.progress import Progress
from pertcast.train.checkpoints import FEATURES, IDENTITY, identity_of, require_same_run
from pertcast.train.run_record import needs_features, run_features, run_of, show_coverage
from pertcast.train.training_effects import TrainingEffects, training_effects


class TrainingBase(NamedTuple):
    """A baseline, and its effects, to which a network adds its own in training."""

    baseline: Baseline  # Fitted on all training effects: what generation uses
    # The row of `left_out_NG` of each context and perturbation of the store, -1 if it is no example
    row_CP: NDArray[np.int64]
    # The effects that the baseline predicts for training perturbations when each is left out
    left_out_NG: NDArray[np.float32]
    feature_PF: NDArray[np.float32]  # Features of the store's perturbations
    control_code: int  # The store's code of the control

    def of(self, groups: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
        """Return the base effect of contexts and perturbations, (B, G): left out in training, 0 for control cells."""
        base_BG = np.zeros((len(groups), self.left_out_NG.shape[1]), dtype=np.float32)
        for place, (context, pert) in enumerate(groups):
            row = self.row_CP[context, pert]
            if row >= 0:
                base_BG[place] = self.left_out_NG[row]
            elif pert != self.control_code:
                base_BG[place] = self._fitted(context, pert)
        return base_BG

    def fitted(self, sets: CellSets) -> NDArray[np.float32]:
        """Return the base effect of each set's perturbation as generation will have it, nothing left out."""
        return np.stack([self._fitted(*codes) for codes in sets.groups])

    def _fitted(self, context: int, pert: int) -> NDArray[np.float32]:
        return predict_effects(self.baseline, self.feature_PF[pert : pert + 1], context=context)[0]


def fit_base(
    kind: BaselineKind,
    store: Store,
    features: PertFeatures,
    *,
    output_genes: NDArray[np.int64],
    set_size: int,
    progress: Progress,
) -> TrainingBase:
    """Fit a baseline on the effects of the store's training cells."""
    effects = training_effects(store, output_genes, progress=progress)
    if not len(effects.perts):
        raise DataError(
            f"{store.path}: no training perturbation has training control cells in its context, so there is no effect "
            "to fit a baseline on; correct [training]"
        )
    feature_PF = features.of(store.perts)
    examples = Examples(effects.contexts, feature_PF[effects.perts], effects.effects_NG, len(store.contexts))
    fit = fit_baseline(kind, examples, set_size=set_size)
    row_CP = np.full((len(store.contexts), len(store.perts)), -1, dtype=np.int64)
    row_CP[effects.contexts, effects.perts] = np.arange(len(effects.perts))
    progress.note(_sentence(fit.baseline, effects.effects_NG))
    return TrainingBase(fit.baseline, row_CP, fit.left_out_NG, feature_PF, store.control_code)


def refit_base(
    known: Baseline,
    store: Store,
    features: PertFeatures,
    effects: TrainingEffects,
    *,
    with_line: bool,
    progress: Progress,
) -> TrainingBase:
    """Refit a baseline on its examples and, if asked, on the effects of a new line's training cells."""
    feature_PF = features.of(store.perts)
    used = np.flatnonzero((np.bincount(effects.contexts)[effects.contexts] > 1) & with_line)
    contexts, perts = effects.contexts[used], effects.perts[used]
    before = examples_of(known)
    kept = ~np.isin(before.context_N, contexts)
    examples = Examples(
        np.concatenate([contexts, before.context_N[kept]]),
        np.concatenate([feature_PF[perts], before.feature_NF[kept]]),
        np.concatenate([effects.effects_NG[used], before.effect_NG[kept]]),
        len(store.contexts),
    )
    fit = fit_baseline(known.spec.kind, examples, set_size=known.spec.set_size)
    row_CP = np.full((len(store.contexts), len(store.perts)), -1, dtype=np.int64)
    row_CP[contexts, perts] = np.arange(len(used))
    name = f"the run's {known.spec.kind} baseline"
    if not with_line:
        progress.note(f"{name} is unchanged: the offset corrects its error on the line")
    elif len(used):
        progress.note(f"{name} is refitted with {len(used):,} training effects of the line")
    else:
        progress.note(f"{name} is unchanged: no context of the line has two training targets")
    return TrainingBase(fit.baseline, row_CP, fit.left_out_NG[: len(used)], feature_PF, store.control_code)


def _sentence(baseline: Baseline, effects_NG: NDArray[np.float32]) -> str:
    """Describe the choice of leave-one-out and its error."""
    spec, choice = baseline.spec, baseline.spec.choice
    chosen = {
        "control": {},
        "mean": {},
        "ridge": {"penalty": choice.penalty, "sharing": choice.sharing},
        "kernel_ridge": {"penalty": choice.penalty, "bandwidth": choice.bandwidth, "sharing": choice.sharing},
        "knn": {"neighbours": choice.neighbours, "sharing": choice.sharing},
    }[spec.kind]
    square = float(np.nanmean(effects_NG.astype(np.float64) ** 2))
    share = choice.error / square if square else float("nan")
    words = "".join(f", {name} {value:.4g}" for name, value in chosen.items())
    return (
        f"{spec.kind} baseline of {len(effects_NG):,} training effects{words}; left out one by one, its squared error "
        f"is {share:.3f} of that of no effect"
    )


def train_baseline(experiment: Experiment, store: Store, out: Path, *, progress: Progress) -> Path:
    """Fit the baseline that ``model.kind`` names, and write it as a run."""
    kind = experiment.model.kind
    assert kind != "state"
    identity = _identity(experiment, store)
    require_same_run(out, identity)
    if (out / MANIFEST).is_file():
        progress.note(f"{out}: already fitted")
        return out
    features = run_features(experiment, store, out)
    show_coverage(features, store, experiment, progress)
    output_genes = store.hvg if experiment.model.output == "hvg" else np.arange(len(store.genes))
    size = set_size_of(experiment.model)
    fitted = fit_base(kind, store, features, output_genes=output_genes, set_size=size, progress=progress)
    write_json(out / IDENTITY, identity)
    save_features(features, out / FEATURES)
    arrays = {name: torch.from_numpy(value) for name, value in arrays_of(fitted.baseline).items()}
    filled = f"{len(features.filled):,} perturbations have a feature that was filled in"
    metrics = {
        "last_step": 0,
        "val_loss": None,
        "num_parameters": sum(value.size for value in arrays_of(fitted.baseline).values()),
        "stopped_early": False,
    }
    run = run_of(out, fitted.baseline.spec, experiment, store, features, output_genes)
    run = replace(run, metrics=metrics, notes=(filled,) if features.filled else ())
    save_run(run, arrays, inputs={"store": store.fingerprint})
    return out


def _identity(experiment: Experiment, store: Store) -> dict[str, Any]:
    whole = identity_of(experiment, store.fingerprint)
    return {name: whole[name] for name in ("store", "model", *(("features",) if needs_features(experiment) else ()))}
