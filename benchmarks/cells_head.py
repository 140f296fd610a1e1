"""Cells of a trained counts head beside cells made of the same network's log1p output, on held-out targets.

One simulated screen and one small network a seed, trained with ``loss.nb``, and once more without it: the head shares
the hidden states with the log1p output, and its loss teaches them, too. Metrics are the official ones, of cells in
counts at the depths of the real ones; ranks are among the held-out targets. The variance ratio is a target's median
over genes of made over real cells. Half of the real cells against the other half stand beside them.

    python -m benchmarks.cells --tables head --seeds 5
    python -m benchmarks.cells --tables head --seeds 3 --set loss.de=0.2 loss.rank=1
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import numpy as np
from benchmarks.makers import to_log1p, totals_of
from benchmarks.screen import ScreenConfig, draw_screen, made_up_features
from benchmarks.write_screen import write_screen
from numpy.typing import NDArray
from scipy import sparse

from pertcast.config import Experiment, load_experiment
from pertcast.data.prepare import prepare
from pertcast.data.store import Store
from pertcast.generate import generate
from pertcast.ladder.held_out import HeldOut, against_truth, prepare_truth
from pertcast.ladder.scored_side import read_halves, read_side, select_perts
from pertcast.progress import SILENT
from pertcast.seasons import PERT_COLUMN, season
from pertcast.stats.realism import Reference, compare_cells
from pertcast.submission.assemble import assemble
from pertcast.train import train

__all__ = ["head_table"]

_WAYS = ("donors", "negative_binomial", "nb_head")
_METRICS = ("des", "mae", "pds", "effect_correlation", "num_de_predicted", "variance")
_NETWORK = (
    "model.preset=tiny",
    "model.hidden=128",
    "model.layers=1",
    "model.encoder_layers=1",
    "model.residual=shift",
    "model.set_size=16",
    "train.steps=600",
    "train.decay_steps=600",
    "train.learning_rate=1e-3",
    "train.feature_noise=1",
    "train.control_sets=false",
    "loss.warmup_steps=100",
    "loss.mae=10",
    "generate.scale=counts",
)


def head_table(seeds: Sequence[int], weight: float, *, more: Sequence[str] = ()) -> None:
    """Print the metrics of each way to make cells, means over seeds, and their differences from `donors`."""
    found: dict[str, list[dict[str, NDArray[np.float64]]]] = {}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            for how, metrics in _scores(Path(folder), seed, weight, more).items():
                found.setdefault(how, []).append(metrics)
    print(f"\nTrained counts head, loss.nb = {weight}, simulated, seeds {list(seeds)} (± standard error over seeds)\n")
    print("| cells | DES | MAE | PDS | effect r | DE calls | variance | minus donors: DES | PDS | MAE, % |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    means = {
        how: np.array([[np.nanmean(metrics.get(name, np.ones(1))) for name in _METRICS] for metrics in scored])
        for how, scored in found.items()
    }
    for how, found_of in means.items():
        columns = [_of(found_of[:, place], digits) for place, digits in enumerate((3, 4, 3, 3, 1, 2))]
        less = found_of - means["donors"]
        columns += [_of(less[:, 0]), _of(less[:, 2]), _of(100 * less[:, 1] / means["donors"][:, 1], 1)]
        print(f"| {how} | {' | '.join(columns)} |")


def _of(values: NDArray[np.float64], digits: int = 3) -> str:
    error = values.std() / np.sqrt(max(len(values) - 1, 1))
    return f"{values.mean():.{digits}f} ± {error:.{digits}f}"


def _scores(folder: Path, seed: int, weight: float, more: Sequence[str]) -> dict[str, dict[str, NDArray[np.float64]]]:
    config = ScreenConfig(num_targets=300, num_genes=1000, cells_per_target=80, num_controls=1000, seed=seed)
    genes = [f"G{number}" for number in range(config.num_genes)]
    screen = draw_screen(genes, made_up_features(genes, seed=seed), config)
    path = write_screen(folder, screen, config, num_val=20, num_test=60)
    experiment = load_experiment(path, [*_NETWORK, f"train.seed={seed}", f"loss.nb={weight}", *more])
    store = prepare(experiment, folder / "store")
    runs = {"": train(experiment, store, folder / "run")}
    without = load_experiment(path, [*_NETWORK, f"train.seed={seed}", *more])
    runs[", of a run without the head"] = train(without, store, folder / "without")
    rules = season(experiment.submission.season)
    (held,) = prepare_truth(Store.open(store), experiment, folder, rules=rules, ranked={})
    truth = read_side(held.truth, rules, progress=SILENT)
    halves = read_halves(held.truth, rules, progress=SILENT)
    # one half of the real cells against the other
    real = against_truth(select_perts(halves[1], held.tested), halves[0])
    found = {"real cells, halves": _columns(real)}
    for way, which in [*((way, "") for way in _WAYS), ("donors", ", of a run without the head")]:
        cells, parts = folder / f"{way}{which}.h5ad", folder / f"{way}{which}"
        asked = load_experiment(path, [*_NETWORK, *more, f"generate.cells={way}"])
        generate(runs[which], parts, experiment=_asking_for(asked, held, len(genes)), store_path=store)
        assemble(parts, cells)
        scored = against_truth(read_side(cells, rules, progress=SILENT), truth)
        found[f"{way}{which}"] = _columns(scored) | {"variance": _variance(cells, held)}
    return found


def _columns(scored: dict[str, dict[str, float]]) -> dict[str, NDArray[np.float64]]:
    return {name: np.array([row[name] for row in scored.values()]) for name in _METRICS[:-1]}


def _asking_for(experiment: Experiment, held: HeldOut, num_genes: int) -> Experiment:
    rules = {"num_genes": num_genes, "num_targets": len(held.tested), "max_cells": held.num_cells}
    given = {
        "targets": held.targets,
        "context": held.context,
        "controls": "copied",
        "num_controls": held.num_controls,
        "rules": rules,
    }
    return experiment.model_copy(update={"submission": experiment.submission.model_copy(update=given)})


def _variance(cells: Path, held: HeldOut) -> NDArray[np.float64]:
    """Return the median variance ratio of each target's made cells over its real ones."""
    made, real = _by_target(cells), _by_target(held.truth)
    target_sum = held.target_sum or 1.0
    ratios = []
    for name in held.tested:
        reference = Reference(to_log1p(real[name], target_sum))
        ratios.append(compare_cells(to_log1p(made[name], target_sum), reference).variance_ratio[1])
    return np.array(ratios)


def _by_target(path: Path) -> dict[str, sparse.csr_matrix]:
    data = ad.read_h5ad(path)
    labels, counts = data.obs[PERT_COLUMN].astype(str).to_numpy(), sparse.csr_matrix(data.X, dtype=np.float64)
    counts = counts[totals_of(counts) > 0]
    return {name: counts[labels == name] for name in np.unique(labels)}
