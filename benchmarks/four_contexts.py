"""What baselines and rungs do on real held-out perturbations: 33 K562 labels and four cell lines, 5 folds, 3 seeds.

Settings: ``pairs`` (33 K562 labels, 15 of them pairs of genes), ``singles`` (its 18 single targets), ``contexts`` (a
target held out in one of four cell lines and seen in the others). Each method predicts every target when it is held
out; the predictions of the folds are scored together, against the real cells and with the same real controls.
A method that was scored is kept and not made again, so the command can be stopped and repeated.

    python -m benchmarks.four_contexts --out results --methods baselines
    python -m benchmarks.four_contexts --out results --methods state --settings pairs
    python -m benchmarks.four_contexts --out results --table
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from benchmarks.four_contexts_table import write_table
from benchmarks.predictions import find_shared
from numpy.typing import NDArray
from scipy import sparse

from pertcast.config import Experiment, load_experiment
from pertcast.data.cell_sets import generation_sets
from pertcast.data.features import load_features, open_features
from pertcast.data.prepare import prepare
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import DataError
from pertcast.files.artefacts import write_json
from pertcast.files.scales import normalise_log1p
from pertcast.generate.cells import shift_sparing_zeros
from pertcast.generate.predict import make_predictor
from pertcast.ladder.score import compare_sides
from pertcast.ladder.scored_side import PseudobulkStats, read_halves, read_side
from pertcast.models.run_folder import open_run
from pertcast.seasons import CONTROL_LABEL, season
from pertcast.stats.draws import generator
from pertcast.train import train

NUM_FOLDS, NUM_SEEDS = 5, 3
SETTINGS = ("pairs", "singles", "contexts")
GO = ('features.kind="file"', 'features.missing="mean"', 'features.combine="mean"')
LABELS = ('features.kind="labels"', 'features.missing="mean"')
SMALL = (
    "model.residual=shift",
    "model.hidden=128",
    "model.layers=2",
    "model.heads=4",
    "model.feedforward=256",
    "model.encoder_layers=1",
    "model.decoder_layers=1",
    "model.set_size=32",
    "train.steps=100",
    "train.learning_rate=3e-4",
    "train.warmup_steps=10",
    "train.control_sets=false",
    "train.match=context",
    "train.val_every=100000",
    "train.checkpoint_every=100000",
    "loss.warmup_steps=20",
)
RUNGS = {
    "c1": (),
    "c2": ("loss.mae=10.0",),
    "c3": ("loss.mae=10.0", "loss.de=0.2"),
    "c4": ("loss.mae=10.0", "loss.de=0.2", "loss.rank=1.0"),
}


@dataclass(frozen=True)
class Method:
    """What is trained, by overrides of the experiment, and how cells are made: ``add`` or ``sparse``.

    `num_val` of the training targets of each context validate.
    """

    name: str
    overrides: tuple[str, ...]
    cells: str = "sparse"
    num_val: int = 0


def methods(group: str) -> list[Method]:
    """Return the methods of a group, ``baselines`` or ``state``."""
    if group == "baselines":
        found = [
            Method("control copy", ("model.kind=control",)),
            Method("mean effect, add", ("model.kind=mean",), "add"),
            Method("mean effect", ("model.kind=mean",)),
            Method("ridge on GO, add", ("model.kind=ridge", *GO), "add"),
        ]
        for kind, word in (("ridge", "ridge"), ("kernel_ridge", "kernel ridge"), ("knn", "neighbours")):
            found += [
                Method(f"{word} on {name}", (f"model.kind={kind}", *features))
                for name, features in (("GO", GO), ("labels", LABELS))
            ]
        return found
    bases = {"none, GO": ("none", GO), "mean, GO": ("mean", GO), "ridge, labels": ("ridge", LABELS)}
    return [
        Method(f"state {rung} (base {name})", (*SMALL, *terms, f"model.base={base}", *features))
        for name, (base, features) in bases.items()
        for rung, terms in RUNGS.items()
    ]


def altered(method: Method, overrides: Sequence[str], num_val: int) -> Method:
    """Return a method with further overrides and with targets that validate, which its name tells."""
    words = [item.rpartition(".")[2].replace("=", " ") for item in overrides]
    words += [f"{num_val} validate"] if num_val else []
    name = f"{method.name}; {', '.join(words)}" if words else method.name
    return replace(method, name=name, overrides=(*method.overrides, *overrides), num_val=num_val)


def write_data(out: Path) -> dict[str, Path]:
    """Write the cells once as log1p on one scale, all of them and K562 alone, and the season's labels."""
    paths = {setting: out / f"{setting}.h5ad" for setting in SETTINGS}
    if all(path.is_file() for path in paths.values()):
        return paths
    cells = ad.read_h5ad(find_shared() / "four_contexts.h5ad")
    counts = sparse.csr_matrix(cells.X, dtype=np.float64)
    totals = np.asarray(counts.sum(axis=1)).ravel()
    is_control = (cells.obs["perturbation"] == "control").to_numpy()
    size = float(np.median(totals[is_control]))
    log1p = normalise_log1p(counts.astype(np.float32), totals, size)
    labels = cells.obs["perturbation"].astype(str).where(~is_control, CONTROL_LABEL)
    obs = pd.DataFrame({"target_gene": labels, "cell_type": cells.obs["cell_type"].astype(str)})
    whole = ad.AnnData(log1p, obs=obs.astype("category"), var=pd.DataFrame(index=cells.var_names))
    everywhere = set.intersection(*({*labels[obs["cell_type"] == name]} for name in obs["cell_type"].unique()))
    is_k562 = (obs["cell_type"] == "k562").to_numpy()
    is_single = ~labels.str.contains("+", regex=False).to_numpy()
    kept = {"pairs": is_k562, "singles": is_k562 & is_single, "contexts": np.ones(len(obs), dtype=bool)}
    for setting, path in paths.items():
        whole[kept[setting]].copy().write_h5ad(path)
    write_json(out / "everywhere.json", sorted(everywhere - {CONTROL_LABEL}))
    return paths


def folds(setting: str, path: Path, seed: int) -> Iterator[dict[str, list[str]]]:
    """Yield what each fold holds out: context -> targets; everything asked for is held out once."""
    obs = ad.read_h5ad(path, backed="r").obs
    random = generator(seed, "folds", setting)
    if setting != "contexts":
        labels = sorted(set(obs["target_gene"]) - {CONTROL_LABEL})
        order = random.permutation(len(labels))
        for fold in range(NUM_FOLDS):
            yield {"k562": [labels[place] for place in sorted(order[fold::NUM_FOLDS])]}
        return
    targets = json.loads((path.parent / "everywhere.json").read_text())
    start, contexts = random.permutation(len(targets)), sorted(set(obs["cell_type"]))
    for fold in range(NUM_FOLDS):
        # a target is held out in at most one context of a fold
        yield {
            context: [name for name, first in zip(targets, start, strict=True) if (first + place) % NUM_FOLDS == fold]
            for place, context in enumerate(contexts)
        }


def experiment_for(folder: Path, path: Path, held_out: dict[str, list[str]], method: Method, seed: int) -> Experiment:
    """Return the experiment of one fold."""
    val = _validating(path, held_out, method.num_val, seed)
    lines = [
        "[datasets]",
        f'cells = "{path}"',
        '[training]\ncells = "train"',
        '[columns]\ncell_type = "cell_type"',
        # cells that validate need a few controls beside them; the official metrics of `train.select_by` take the others
        f"[prepare]\nval_controls = {0.05 if method.num_val else 0.0}\ntest_controls = 0.0",
        *(
            f'[fewshot."cells.{context}"]\ntest = {json.dumps(names)}\nval = {json.dumps(val[context])}'
            for context, names in held_out.items()
            if names
        ),
    ]
    file = folder / "experiment.toml"
    file.write_text("\n".join(lines) + "\n")
    overrides = [*method.overrides, f"train.seed={seed}", "model.set_size=32"]
    if 'features.kind="file"' in overrides:
        overrides.append(f'features.path="{find_shared() / "go_bp_svd256.npz"}"')
    if len(held_out) > 1 and "model.residual=shift" in overrides:
        overrides.append("model.context_embedding=true")
    return load_experiment(file, overrides)


def _validating(path: Path, held_out: dict[str, list[str]], num: int, seed: int) -> dict[str, list[str]]:
    """Draw who validates: of each context's training targets, in `contexts` of those that are seen in every context."""
    obs = ad.read_h5ad(path, backed="r").obs
    everywhere = json.loads((path.parent / "everywhere.json").read_text())
    found: dict[str, list[str]] = {}
    for context, names in held_out.items():
        here = sorted(set(obs["target_gene"][obs["cell_type"] == context]) - {CONTROL_LABEL, *names})
        others = [name for name in here if len(held_out) == 1 or name in everywhere]
        drawn = generator(seed, "validate", context, *names).permutation(len(others))[:num]
        found[context] = sorted(others[place] for place in drawn)
    return found


def predict_fold(
    folder: Path, path: Path, held_out: dict[str, list[str]], method: Method, seed: int
) -> Iterator[tuple[str, str, NDArray[np.float32]]]:
    """Train without a fold's targets and yield (context, target, cells), as many cells as there are real ones."""
    folder.mkdir(parents=True, exist_ok=True)
    experiment = experiment_for(folder, path, held_out, method, seed)
    store = Store.open(prepare(experiment, folder / "store"))
    run = open_run(train(experiment, store.path, folder / "run"))
    features = load_features(experiment.features, store) if experiment.model.kind not in ("control", "mean") else None
    predictor = make_predictor(run, store, features or open_features(run.path / "features"))
    for context, names in held_out.items():
        code = store.contexts.index(context)
        pool = store.rows(split=Split.TRAIN, context=code, pert=store.control_code)
        for target in names:
            number = len(store.rows(split=Split.TEST, context=code, pert=store.perts.index(target)))
            rows_BS = generation_sets(
                store, context=code, target=target, num_cells=number, set_size=32, seed=seed, controls=pool
            )
            cells = predictor.predict(rows_BS, target=target, context=context)[:number]
            if method.cells == "sparse":
                controls = store.log1p(rows_BS.reshape(-1)[:number])
                cells = shift_sparing_zeros(controls, np.maximum(cells.mean(axis=0, dtype=np.float64), 0))
            yield context, target, np.maximum(cells, np.float32(0))


def score_method(out: Path, setting: str, method: Method, seed: int) -> None:
    """Predict every fold, score them together in each context, and keep the metrics of each target."""
    name = re.sub(r"[^\w.]+", "_", method.name)
    result = out / "scores" / setting / f"{name}-{seed}.json"
    if result.is_file():
        return
    path, work = write_data(out)[setting], out / "work" / setting / f"{name}-{seed}"
    found: dict[str, dict[str, NDArray[np.float32]]] = {}
    for number, held_out in enumerate(folds(setting, path, seed)):
        for context, target, cells in predict_fold(work / str(number), path, held_out, method, seed):
            found.setdefault(context, {})[target] = cells
    scores = {}
    for context, made in found.items():
        truth = real_side(out, setting, context, sorted(made))
        predicted = side_of(out, setting, context, made)
        for target, values in compare_sides(predicted, truth).items():
            size = float(np.linalg.norm(truth.effects[truth.perts.index(target)]))
            scores[f"{context}/{target}"] = {**values, "effect_size": size}
    result.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, {"method": method.name, "cells": method.cells, "seed": seed, "targets": scores})
    shutil.rmtree(work)
    print(setting, seed, method.name, {key: round(_mean(scores, key), 4) for key in ("mae", "des", "pds")}, flush=True)


def _mean(scores: dict[str, dict[str, float]], key: str) -> float:
    return float(np.nanmean([values[key] for values in scores.values()]))


def real_side(out: Path, setting: str, context: str, targets: Sequence[str]) -> PseudobulkStats:
    """Return the real cells of a context's targets."""
    path = out / "real" / f"{setting}-{context}.h5ad"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = ad.read_h5ad(out / f"{setting}.h5ad")
        wanted = cells.obs["target_gene"].isin([*targets, CONTROL_LABEL]) & (cells.obs["cell_type"] == context)
        cells[wanted.to_numpy()].copy().write_h5ad(path)
    return read_side(path, season("vcc2025"), cache=out / "cache")


def side_of(out: Path, setting: str, context: str, made: dict[str, NDArray[np.float32]]) -> PseudobulkStats:
    """Return predicted cells beside the real controls."""
    real = ad.read_h5ad(out / "real" / f"{setting}-{context}.h5ad")
    controls = real[(real.obs["target_gene"] == CONTROL_LABEL).to_numpy()]
    labels = [CONTROL_LABEL] * controls.n_obs + [name for name, cells in made.items() for _ in range(len(cells))]
    values = sparse.vstack([controls.X, *(sparse.csr_matrix(cells) for cells in made.values())]).tocsr()
    obs = pd.DataFrame({"target_gene": pd.Categorical(labels)}, index=[str(n) for n in range(len(labels))])
    path = out / "work" / f"{setting}-{context}-{os.getpid()}.h5ad"
    path.parent.mkdir(parents=True, exist_ok=True)
    ad.AnnData(values, obs=obs, var=real.var).write_h5ad(path)
    try:
        return read_side(path, season("vcc2025"))
    finally:
        path.unlink()


def score_ceiling(out: Path, setting: str, seed: int) -> None:
    """Score one half of the real cells for the other."""
    result = out / "scores" / setting / f"ceiling-{seed}.json"
    scores = {}
    for path in sorted((out / "real").glob(f"{setting}-*.h5ad")):
        first, second = read_halves(path, season("vcc2025"), seed=seed)
        for target, values in compare_sides(second, first).items():
            size = float(np.linalg.norm(first.effects[first.perts.index(target)]))
            scores[f"{path.stem.partition('-')[2]}/{target}"] = {**values, "effect_size": size}
    write_json(result, {"method": "ceiling: half for half", "cells": "real", "seed": seed, "targets": scores})


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--methods", choices=("baselines", "state"), help="which methods to predict with and score")
    parser.add_argument("--only", default="", help="methods whose name has this in it")
    parser.add_argument(
        "--set", nargs="+", default=[], help="overrides of the experiment, which become part of the name"
    )
    parser.add_argument("--validate", type=int, default=0, help="training targets of each context that validate")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(NUM_SEEDS)))
    parser.add_argument("--table", action="store_true", help="print the tables of all that was scored")
    given = parser.parse_args(arguments)
    out = given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds if given.methods else ():
        for setting in given.settings:
            for method in methods(given.methods):
                if given.only in method.name:
                    score_method(out, setting, altered(method, given.set, given.validate), seed)
            score_ceiling(out, setting, seed)
    if given.table:
        for setting in given.settings:
            if not (out / "scores" / setting).is_dir():
                raise DataError(f"{out}: nothing is scored for {setting}; run it with --methods first")
            print(write_table(out / "scores" / setting, title=setting))


if __name__ == "__main__":
    _main()
