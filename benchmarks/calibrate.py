"""What calibration gains on a simulated screen: test targets that nothing has looked at, with and without it.

A network is trained on a screen; its weights as they are ("trained"), and with the last layer at 0.4 of its weights, so
that every effect is too small ("shrunken"). Each is calibrated on its validation targets, generates the test targets
with and without, and is scored against their real cells, relative to the official training-mean baseline. What is done
is kept in OUT/calibrate.jsonl.

    python -m benchmarks.calibrate --seed 0 --out bench      # a seed at a time
    python -m benchmarks.calibrate --out bench               # the table
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
from benchmarks.screen import ScreenConfig, draw_screen, made_up_features
from benchmarks.write_screen import write_screen
from numpy.typing import NDArray
from scipy import stats

from pertcast.config import load_experiment
from pertcast.data.prepare import prepare
from pertcast.files.artefacts import hash_file
from pertcast.generate import generate
from pertcast.generate.calibration import open_calibration
from pertcast.ladder.calibration import calibrate
from pertcast.ladder.mean_baseline import TrainingMean
from pertcast.ladder.score import score
from pertcast.models.run_folder import WEIGHTS, load_tensors, open_run, save_run
from pertcast.submission.assemble import assemble
from pertcast.train import train

__all__: list[str] = []

SHRUNKEN = 0.4
WAYS = ("model", "sparse")
METRICS = ("overall", "mae", "pds", "des", "effect_correlation")
_LEARNING = [
    'model.preset="tiny"',
    "model.hidden=128",
    'model.residual="shift"',
    "train.steps=800",
    "train.learning_rate=1e-3",
    'train.match="context"',
    "train.val_every=100",
    "loss.mae=1.0",
]


def run_seed(seed: int, out: Path, *, ways: Sequence[str]) -> None:
    """Do a seed."""
    config = ScreenConfig(
        num_targets=96,
        num_genes=400,
        cells_per_target=60,
        num_controls=300,
        num_batches=1,
        umi=2000.0,
        strength=0.25,
        seed=seed,
    )
    folder = out / f"calibrate_{seed}"
    genes = [f"G{number}" for number in range(config.num_genes)]
    screen = draw_screen(genes, made_up_features(genes, seed=seed), config)
    path = write_screen(folder, screen, config, num_val=16, num_test=32)
    experiment = load_experiment(path, [*_LEARNING, f"train.seed={seed}"])
    trained = train(experiment, prepare(experiment, folder / "store"), folder / "trained")
    held = experiment.fewshot["screen.sim"]
    cells = ad.read_h5ad(folder / "screen.h5ad")
    label = cells.obs["target_gene"]
    _write(cells, label.isin([*held.test, "non-targeting"]).to_numpy(), folder / "truth.h5ad")
    _write(cells, ~label.isin([*held.test, *held.val]).to_numpy(), folder / "training.h5ad")
    rows = "".join(f"{name},{config.cells_per_target},2000\n" for name in held.test)
    (folder / "targets.csv").write_text(f"target_gene,n_cells,median_umi_per_cell\n{rows}")
    for name, run in (("trained", trained), ("shrunken", _shrunken(trained, folder / "shrunken"))):
        for way in ways:
            calibrate(run, overrides=[f"generate.cells={way!r}"])
            found = open_calibration(run)
            values = [_scores(folder, run, way, is_calibrated=on) for on in (False, True)]
            entry = {"seed": seed, "run": name, "cells": way, "amplitude": found.amplitude, "slope": found.slope}
            with (out / "calibrate.jsonl").open("a") as stream:
                stream.write(
                    json.dumps({**entry, "spread": found.spread, "plain": values[0], "with": values[1]}) + "\n"
                )
    shutil.rmtree(folder)


def _write(cells: ad.AnnData, kept: NDArray[np.bool_], path: Path) -> None:
    cells[kept].copy().write_h5ad(path)


def _shrunken(trained: Path, out: Path) -> Path:
    """Return a copy of a run whose shifts are smaller."""
    run, weights = open_run(trained), load_tensors(trained / WEIGHTS)
    shutil.copytree(trained / "features", out / "features")
    last = max(name for name in weights if name.startswith("project_out.")).split(".")[1]
    for kind in ("weight", "bias"):
        weights[f"project_out.{last}.{kind}"] = weights[f"project_out.{last}.{kind}"] * SHRUNKEN
    save_run(replace(run, path=out), weights, inputs={"run": hash_file(trained / WEIGHTS)})
    return out


def _scores(folder: Path, run: Path, way: str, *, is_calibrated: bool) -> dict[str, float]:
    num_targets = len((folder / "targets.csv").read_text().splitlines()) - 1
    overrides = [
        f"submission.targets={str(folder / 'targets.csv')!r}",
        f"submission.rules.num_targets={num_targets}",
        f"generate.cells={way!r}",
        f"generate.calibrated={str(is_calibrated).lower()}",
    ]
    parts, prediction = folder / "parts", folder / "prediction.h5ad"
    shutil.rmtree(parts, ignore_errors=True)
    prediction.unlink(missing_ok=True)
    assemble(generate(run, parts, overrides=overrides), prediction)
    found = score(prediction, folder / "truth.h5ad", baseline=TrainingMean(folder / "training.h5ad"))
    return {name: found.overall[name] for name in METRICS}


def table(out: Path) -> Iterator[str]:
    """Yield the table: means over seeds, and the gain with its interval."""
    entries = [json.loads(text) for text in (out / "calibrate.jsonl").read_text().splitlines()]
    for run in ("trained", "shrunken"):
        for way in WAYS:
            some = [entry for entry in entries if (entry["run"], entry["cells"]) == (run, way)]
            if not some:
                continue
            amplitudes = ", ".join(f"{entry['amplitude']:.3g}" for entry in some)
            yield f"{run}, cells = {way}, {len(some)} seeds, amplitudes {amplitudes}"
            for metric in METRICS:
                plain, calibrated = (np.array([entry[key][metric] for entry in some]) for key in ("plain", "with"))
                gain = calibrated - plain
                half = stats.t.ppf(0.975, len(gain) - 1) * gain.std(ddof=1) / np.sqrt(len(gain))
                yield f"| {metric} | {plain.mean():.4f} | {calibrated.mean():.4f} | {gain.mean():+.4f} ± {half:.4f} |"


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--cells", choices=WAYS, nargs="+", default=list(WAYS))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.seed is None:
        print("\n".join(table(given.out)))
        return
    os.environ["PERTCAST_CACHE"] = str(given.out / "cache")
    run_seed(given.seed, given.out, ways=given.cells)


if __name__ == "__main__":
    _main()
