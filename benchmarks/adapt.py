"""Learning curves of few-shot adaptation: a new cell line with 0, 1, 2, 4, 8 of its targets, beside its mean effect.

A network is trained on other lines, and asked for targets of a line that it has not met. Without adaptation
("zero"); with K targets of the line in all, those for early stopping among them (K = 1: a fifth of its cells); or
the mean effect of these K put onto the line's control cells ("mean"), where they are not 0. All are scored by the
official metrics on the same held-out targets of the line, with the line's controls on both sides; the overall is
relative to copies of controls. What is done is kept in OUT/results.jsonl, and not done again.

"few" is the default, the offset; it takes no steps, so that all cells of the K targets are learnt from, as of "gain".
"steps" are of the context row and the last bias.

A network "on mean" adds its shift to the mean effect (model.base), which `adapt` refits with the line's targets unless
it learns an offset; "zero" stands on the mean effect of the other lines. There every method's cells are made as
"donors", "mean" and "copy" are runs of these baselines, and a fifth of the cells of the K targets says when to stop
where steps are taken.

    python -m benchmarks.adapt --data sim --seed 0 --out bench      # a seed at a time
    python -m benchmarks.adapt --out bench                          # the tables
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from benchmarks.screen import ScreenConfig, draw_cells, draw_screen, made_up_features
from numpy.typing import NDArray
from scipy import sparse, stats

from pertcast.config import load_experiment
from pertcast.data.prepare import prepare
from pertcast.generate import generate
from pertcast.ladder.score import score
from pertcast.models.baselines import examples_of, fit_baseline, save_baseline
from pertcast.models.run_folder import BASE, WEIGHTS, load_tensors, open_run, save_run
from pertcast.stats.draws import generator
from pertcast.stats.metrics import overall
from pertcast.submission.assemble import assemble
from pertcast.train import train
from pertcast.train.adapt import adapt
from pertcast.train.new_line import adapted_experiment

__all__: list[str] = []

CURVE = (1, 2, 4, 8)
LEARN = {"few": "offset", "steps": "context,bias", "gain": "gain", "lora": "context,bias,lora:4"}
WITHOUT_STEPS = ("few", "gain")
ON_MEAN = "on mean"
METRICS = ("mae", "effect_correlation", "pds", "des", "overall")
_EXPERIMENT = """
[datasets]
cells = "{cells}"
[training]
cells = "train"
{fewshot}
[columns]
pert = "target_gene"
cell_type = "cell_type"
[prepare]
val_controls = 0.1
holdout_cells = {holdout}
[features]
kind = "file"
path = "features.npz"
missing = "mean"
"""
_MODEL = """
[model]
preset = "tiny"
hidden = 128
residual = "{residual}"
base = "{base}"
[train]
steps = {steps}
learning_rate = 1e-3
match = "context"
seed = {seed}
[loss]
mae = 1.0
warmup_steps = 100
"""


@dataclass(frozen=True)
class Line:
    """A new line: its cells, which of its targets may be learnt from, in order, and which test."""

    trained_on: ad.AnnData
    cells: ad.AnnData
    pool: tuple[str, ...]
    test: tuple[str, ...]
    features: dict[str, NDArray[np.float32]]
    steps: int


def simulated(seed: int, *, context_share: float) -> Line:
    """Return two lines with all targets and a third with effects of its own; half of its targets test."""
    config = ScreenConfig(
        contexts=("A", "B", "C"),
        num_targets=48,
        num_genes=400,
        cells_per_target=50,
        num_controls=200,
        num_batches=1,
        umi=2000.0,
        strength=0.25,
        context_share=context_share,
        seed=seed,
    )
    genes = [f"G{number}" for number in range(config.num_genes)]
    features = made_up_features(genes, seed=seed)
    screen = draw_screen(genes, features, config)
    cells = draw_cells(screen, config)
    order = generator(seed, "adapt", "targets").permutation(len(screen.targets))
    names = tuple(screen.targets[place] for place in order)
    is_new = (cells.obs["cell_type"] == "C").to_numpy()
    return Line(cells[~is_new].copy(), cells[is_new].copy(), names[:8], names[24:], screen.features, 600)


def real(seed: int, *, shared: Path, trained_on: Sequence[str], line: str) -> Line:
    """Return lines of the four contexts; a target of two genes has the sum of their features."""
    cells = ad.read_h5ad(shared / "data" / "four_contexts.h5ad")
    cells.obs["target_gene"] = cells.obs["perturbation"].cat.rename_categories({"control": "non-targeting"})
    cells.obs = cells.obs[["target_gene", "cell_type"]]
    table = np.load(shared / "data" / "go_bp_svd256.npz")
    known = dict(zip(table["gene"].astype(str), table["embedding"].astype(np.float32), strict=True))
    scale = np.sqrt(np.mean([np.square(vector).mean() for vector in known.values()]))
    features = {
        label: np.sum([known[gene] for gene in label.split("+")], axis=0) / scale
        for label in cells.obs["target_gene"].cat.categories
        if all(gene in known for gene in label.split("+"))
    }
    ours = cells[(cells.obs["cell_type"] == line).to_numpy()].copy()
    names = sorted(set(ours.obs["target_gene"]) - {"non-targeting"})
    order = tuple(names[place] for place in generator(seed, "adapt", "targets").permutation(len(names)))
    return Line(cells[cells.obs["cell_type"].isin(trained_on).to_numpy()].copy(), ours, order[:8], order, features, 300)


class Bench:
    """One line and seed on disk."""

    def __init__(self, folder: Path, line: Line, *, residual: str, seed: int) -> None:
        self.folder, self.line, self.is_on_mean = folder, line, residual == ON_MEAN
        folder.mkdir(parents=True, exist_ok=True)
        names = list(line.features)
        np.savez(
            folder / "features.npz", gene=np.array(names), embedding=np.stack([line.features[name] for name in names])
        )
        line.trained_on.write_h5ad(folder / "trained.h5ad")
        line.cells.write_h5ad(folder / "line.h5ad")
        text = _EXPERIMENT.format(cells="trained.h5ad", fewshot="", holdout=0.0)
        shape = {"residual": "shift", "base": "mean"} if self.is_on_mean else {"residual": residual, "base": "none"}
        text += _MODEL.format(**shape, steps=line.steps, seed=seed)
        (folder / "trained.toml").write_text(text)
        experiment = load_experiment(folder / "trained.toml")
        self.run = train(experiment, prepare(experiment, folder / "store"), folder / "run")

    def _written(self, num: int, more: str = "", *, validates: bool = True) -> Path:
        """Write the experiment of the line with so many targets that train or validate; all others test."""
        given = self.line.pool[: max(num, 1)]
        val = () if self.is_on_mean or not validates else given[: num // 4 if num > 2 else num // 2]
        fewshot = f'[fewshot."cells.{self.line.cells.obs["cell_type"].iloc[0]}"]\n'
        others = sorted(set(self.line.cells.obs["target_gene"]) - {*given, "non-targeting"})
        fewshot += f"val = {json.dumps(val)}\ntest = {json.dumps(others)}\n"
        holdout = 0.2 if validates and (num == 1 or self.is_on_mean) else 0.0
        path = self.folder / f"line_{num}_{validates}.toml"
        path.write_text(_EXPERIMENT.format(cells="line.h5ad", fewshot=fewshot, holdout=holdout) + more)
        return path

    def adapted(self, num: int, learn: str) -> Path:
        """Return the run adapted with so many targets; with none it keeps its weights."""
        # with no target: a step that is too small to change a weight
        speed = "steps = 1\nlearning_rate = 1e-30\n" if num == 0 else ""
        validates = learn not in [LEARN[name] for name in WITHOUT_STEPS]
        path = self._written(num, f"[adapt]\n{speed}", validates=validates)
        overrides = ["prepare.test_controls=0.0", f"adapt.trainable={learn!r}"]
        experiment = adapted_experiment(self.run, load_experiment(path, overrides))
        store = prepare(experiment, self.folder / f"store_{num}_{validates}")
        out = adapt(self.run, experiment, store, self.folder / f"adapted_{num}_{learn.replace(',', '_')}")
        if self.is_on_mean and num == 0:
            _forget_line(self.run, out)
        return out

    def baseline(self, kind: str, num: int) -> Path:
        """Return a baseline of all cells of so many targets of the line."""
        total = open_run(self.run).target_sum
        overrides = [f"model.kind={kind!r}", f"prepare.target_sum={total}", "prepare.test_controls=0.0"]
        experiment = load_experiment(self._written(num, validates=False), overrides)
        return train(
            experiment, prepare(experiment, self.folder / f"{kind}_{num}_store"), self.folder / f"{kind}_{num}"
        )

    def predict(self, run: Path, test: Sequence[str]) -> Path:
        """Return a prediction of as many cells of each test target as there are."""
        cells = self.line.cells.obs["target_gene"].value_counts()
        targets, out = self.folder / "targets.csv", self.folder / "prediction.h5ad"
        rows = "".join(f"{name},{cells[name]}\n" for name in test)
        targets.write_text(f"target_gene,n_cells\n{rows}")
        controls = int(cells["non-targeting"])
        given = {
            "targets": repr(str(targets)),
            "num_controls": controls,
            "rules.num_genes": self.line.cells.n_vars,
            "rules.num_targets": len(test),
            "rules.max_cells": int(cells[list(test)].sum()) + controls,
            "context": repr(str(self.line.cells.obs["cell_type"].iloc[0])),
        }
        overrides = ["generate.controls_from='all'", *(f"submission.{key}={value}" for key, value in given.items())]
        if self.is_on_mean:
            overrides.append("generate.cells='donors'")
        for path in (self.folder / "parts", out):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return assemble(generate(run, self.folder / "parts", overrides=overrides), out)

    def shifted(self, given: Sequence[str], test: Sequence[str]) -> Path:
        """Return control cells with the mean effect of some targets on all values but zeros."""
        cells = self._log1p()
        label = cells.obs["target_gene"].to_numpy()
        controls = cells[label == "non-targeting"].X.toarray()
        means = (
            np.stack([cells[label == name].X.toarray().mean(0) for name in given])
            if given
            else controls[None, :, :].mean(1)
        )
        effect = means.mean(0) - controls.mean(0)
        seen = np.maximum((controls > 0).mean(0), 1 / len(controls))
        blocks, names = [controls], ["non-targeting"] * len(controls)
        for name in test:
            number = int((label == name).sum())
            rows = generator(0, "adapt", "controls", name).choice(len(controls), number, replace=number > len(controls))
            blocks.append(np.where(controls[rows] > 0, np.maximum(controls[rows] + effect / seen, 0), 0))
            names += [name] * number
        out = self.folder / "shifted.h5ad"
        obs = pd.DataFrame({"target_gene": pd.Categorical(names)}, index=pd.RangeIndex(len(names)).astype(str))
        ad.AnnData(sparse.csr_matrix(np.concatenate(blocks).astype(np.float32)), obs=obs, var=cells.var).write_h5ad(out)
        return out

    def truth(self, test: Sequence[str]) -> Path:
        """Return the real cells of the test targets and all controls."""
        cells, out = self._log1p(), self.folder / "truth.h5ad"
        cells[cells.obs["target_gene"].isin([*test, "non-targeting"]).to_numpy()].copy().write_h5ad(out)
        return out

    def _log1p(self) -> ad.AnnData:
        """Return the line's cells on the run's scale."""
        total = open_run(self.run).target_sum
        assert total is not None
        counts = sparse.csr_matrix(self.line.cells.X, dtype=np.float64)
        sums = np.maximum(np.asarray(counts.sum(1)).ravel(), 1)
        scaled = sparse.diags(total / sums) @ counts
        log1p = sparse.csr_matrix(scaled.log1p().astype(np.float32))
        return ad.AnnData(log1p, obs=self.line.cells.obs, var=self.line.cells.var)


def _forget_line(trained: Path, adapted: Path) -> None:
    """Put an adapted run on the baseline of the run that it was adapted from, which knows no effect of the line."""
    known, run = open_run(trained).baseline(), open_run(adapted)
    assert known is not None
    examples = examples_of(known)._replace(num_contexts=len(run.contexts))
    save_baseline(fit_baseline(known.spec.kind, examples, set_size=known.spec.set_size).baseline, adapted / BASE)
    save_run(run, load_tensors(adapted / WEIGHTS), inputs={})


def _arms(bench: Bench, data: str, learn: Sequence[str]) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """Yield ``(method, K, test targets)``; real lines have too few targets to test the same ones at every K."""
    for num in CURVE:
        test = bench.line.test if data == "sim" else tuple(bench.line.test[num:])
        for method in ("copy", "zero", "mean", *learn):
            yield method, num, test


def run_seed(data: str, seed: int, out: Path, *, residual: str, learn: Sequence[str], line: Line) -> None:
    """Do what is not done yet of a seed."""
    results = out / "results.jsonl"
    lines = [json.loads(text) for text in results.read_text().splitlines()] if results.is_file() else []
    done = {(entry["data"], entry["residual"], entry["seed"], entry["method"], entry["num"]) for entry in lines}
    bench = Bench(out / f"{data}_{residual.replace(' ', '_')}_{seed}", line, residual=residual, seed=seed)
    for method, num, test in _arms(bench, data, learn):
        if (data, residual, seed, method, num) in done:
            continue
        if method in ("copy", "mean") and bench.is_on_mean:
            predicted = bench.predict(bench.baseline("control" if method == "copy" else method, num), test)
        elif method in ("copy", "mean"):
            predicted = bench.shifted(bench.line.pool[:num] if method == "mean" else (), test)
        else:
            predicted = bench.predict(bench.adapted(*((0, "bias") if method == "zero" else (num, LEARN[method]))), test)
        found = score(predicted, bench.truth(test)).overall
        entry = {"data": data, "residual": residual, "seed": seed, "method": method, "num": num, "test": len(test)}
        with results.open("a") as stream:
            stream.write(json.dumps({**entry, **{name: found[name] for name in METRICS if name in found}}) + "\n")
    shutil.rmtree(bench.folder)


def tables(out: Path) -> Iterator[str]:
    """Yield the tables: means over seeds, and how far each is from zero-shot and from the mean effect."""
    entries = [json.loads(text) for text in (out / "results.jsonl").read_text().splitlines()]
    base = {_key(entry): entry for entry in entries if entry["method"] == "copy"}
    for entry in entries:
        entry["overall"] = overall(entry, base[_key(entry)])
    for data, residual in sorted({(entry["data"], entry["residual"]) for entry in entries}):
        some = [entry for entry in entries if (entry["data"], entry["residual"]) == (data, residual)]
        seeds = sorted({entry["seed"] for entry in some})
        yield f"\n{data}, residual = {residual}, {len(seeds)} seeds: mean; difference to zero-shot; to mean effect"
        for metric in METRICS:
            found = {(entry["method"], entry["num"], entry["seed"]): entry.get(metric, float("nan")) for entry in some}
            for method in ("copy", "zero", "mean", *LEARN):
                cells = []
                for num in CURVE:
                    ours, zero, mean = (
                        np.array([found.get((name, num, seed), np.nan) for seed in seeds])
                        for name in (method, "zero", "mean")
                    )
                    shown = f"{np.nanmean(ours):.4f}" if np.isfinite(ours).any() else "–"
                    cells.append(f"{shown} {_difference(ours - zero)} {_difference(ours - mean)}")
                yield f"| {metric} | {method} | " + " | ".join(cells) + " |"


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in ("data", "residual", "seed", "num"))


def _difference(values: NDArray[np.float64]) -> str:
    known = values[np.isfinite(values)]
    if len(known) < 2:
        return ""
    half = stats.t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / np.sqrt(len(known))
    return f"{known.mean():+.4f} ± {half:.4f}"


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", choices=["sim", "k562", "three"])
    parser.add_argument("--residual", choices=["state", "shift", ON_MEAN], default="state")
    parser.add_argument("--learn", choices=list(LEARN), nargs="+", default=["few"])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.data is None:
        print("\n".join(tables(given.out)))
        return
    os.environ["PERTCAST_CACHE"] = str(given.out / "cache")
    shared = Path(os.environ.get("PERTCAST_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if given.data == "sim":
        line = simulated(given.seed, context_share=0.5)
    else:
        new = ("A172", "T98G", "U87MG")[given.seed % 3]
        others = [name for name in ("k562", "A172", "T98G", "U87MG") if name != new]
        line = real(given.seed, shared=shared, trained_on=others[:1] if given.data == "k562" else others, line=new)
    run_seed(given.data, given.seed, given.out, residual=given.residual, learn=given.learn, line=line)


if __name__ == "__main__":
    _main()
