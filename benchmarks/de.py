"""Times the rank-sum statistics beside pdex (and illico, where it is installed) on simulated log1p cells, and compares.

50 targets of 200 cells against 4,000 controls at the real 18,080 genes (fewer with --cells). Everything is in memory
before the clock starts, each tool has compiled on a few cells, and they take turns: A B A B. Prints each time, the
ratio, the largest difference of log10 p and whether the sets at FDR 0.05 are the same; exits with 1 where the ratio to
pdex is above 0.15, log10 p differs by more than 1e-4, or a set differs.

    python benchmarks/de.py --out out/de
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import importlib.util
import io
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from numpy.typing import NDArray

from pertcast.files.resources import available_cpus
from pertcast.files.scales import normalise_log1p
from pertcast.seasons import CONTROL_LABEL, PERT_COLUMN
from pertcast.stats.de import differential_expression
from pertcast.stats.groups import group_cells
from pertcast.stats.metrics import is_significant

__all__ = ["PEERS", "run_illico", "run_ours", "run_pdex"]

Answer = tuple[NDArray[np.float64], NDArray[np.bool_]]
BAR = 0.15


def run_ours(cells: ad.AnnData) -> Answer:
    """Return p-values and significance, (targets, genes), targets sorted."""
    names, codes = np.unique(cells.obs[PERT_COLUMN].to_numpy(str), return_inverse=True)
    groups = group_cells(cells.X, codes)
    control = names == CONTROL_LABEL
    ours, theirs = groups.select(np.flatnonzero(~control)), groups.select(np.flatnonzero(control))
    table = differential_expression(ours, theirs, threads=available_cpus())
    return table.p_value, is_significant(table.fdr)


def run_pdex(cells: ad.AnnData) -> Answer:
    """Return the same by pdex, as cell-eval calls it."""
    pdex = importlib.import_module("pdex").pdex
    frame = pdex(cells, groupby=PERT_COLUMN, mode="ref", reference=CONTROL_LABEL, is_log1p=True, epsilon=0.0)
    order = np.argsort(frame["target"].to_numpy()[:: cells.n_vars])  # pdex keeps the order of categories
    p_value, fdr = (frame[name].to_numpy().reshape(-1, cells.n_vars)[order] for name in ("p_value", "fdr"))
    return p_value, is_significant(fdr)


def run_illico(cells: ad.AnnData) -> Answer:
    """Return p-values by illico; it adjusts them by itself, which is not compared."""
    test = importlib.import_module("illico").asymptotic_wilcoxon
    frame = test(cells, group_keys=PERT_COLUMN, reference=CONTROL_LABEL, is_log1p=True, n_threads=available_cpus())
    p_value = frame["p_value"].unstack()[list(cells.var_names)]
    p_value = p_value.drop(index=CONTROL_LABEL, errors="ignore").sort_index()
    return p_value.to_numpy(), np.empty((0, 0), dtype=bool)


PEERS: dict[str, Callable[[ad.AnnData], Answer]] = {"pertcast": run_ours, "pdex": run_pdex, "illico": run_illico}


def _read(path: Path) -> ad.AnnData:
    cells = ad.read_h5ad(path)
    totals = np.asarray(cells.X.sum(axis=1)).ravel()
    cells.X = normalise_log1p(cells.X, totals, float(np.median(totals)))
    return cells


def _timed(run: Callable[[ad.AnnData], Answer], cells: ad.AnnData) -> tuple[float, Answer]:
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        answer = run(cells)
    return time.perf_counter() - start, answer


def _few(cells: ad.AnnData) -> ad.AnnData:
    labels = cells.obs[PERT_COLUMN].to_numpy(str)
    kept = np.isin(labels, [CONTROL_LABEL, *np.unique(labels)[:2]])
    few = cells[np.flatnonzero(kept)[:400]].copy()
    few.obs[PERT_COLUMN] = few.obs[PERT_COLUMN].cat.remove_unused_categories()
    return few


def _difference(ours: Answer, theirs: Answer) -> float:
    with np.errstate(divide="ignore"):
        logs = [np.log10(np.maximum(side[0], 1e-300)) for side in (ours, theirs)]
    return float(np.abs(logs[0] - logs[1]).max())


def _main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=200, help="cells of each of 50 targets")
    parser.add_argument("--controls", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    shared = (
        Path(os.environ.get("PERTCAST_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "vcc2025"
    )
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"real_{given.cells}_{given.controls}.h5ad"
    if not path.exists():
        with (shared / "pert_counts_Validation.csv").open() as stream:
            targets = [row["target_gene"] for row in csv.DictReader(stream)]
        (given.out / "targets.txt").write_text("\n".join(targets))
        lists = ["--genes", str(shared / "gene_names.csv"), "--targets", str(given.out / "targets.txt")]
        sizes = ["--cells-per-target", str(given.cells), "--controls", str(given.controls), "--seed", "1"]
        script = str(Path(__file__).with_name("simulate.py"))
        subprocess.run([sys.executable, script, *lists, *sizes, "--out", str(path)], check=True)
    cells: Any = _read(path)
    there = [name for name in PEERS if name == "pertcast" or importlib.util.find_spec(name)]
    seconds: dict[str, list[float]] = {name: [] for name in there}
    answers: dict[str, Answer] = {}
    few = _few(cells)
    for name in there:
        _timed(PEERS[name], few)
    for _ in range(given.rounds):
        for name in there:
            took, answers[name] = _timed(PEERS[name], cells)
            seconds[name].append(took)
            print(f"{name:<10}{took:>8.1f} s", flush=True)
    print(f"{platform.machine()}, {available_cpus()} cores; {cells.n_obs:,} cells, {cells.X.nnz:,} values")
    good = True
    for name in there[1:]:
        ratio = min(seconds["pertcast"]) / min(seconds[name])
        difference = _difference(answers["pertcast"], answers[name])
        line = f"pertcast / {name}: {ratio:.3f}; largest difference of log10 p {difference:.2g}"
        if name == "pdex":
            equal = bool(np.array_equal(answers["pertcast"][1], answers[name][1]))
            good = ratio <= BAR and difference <= 1e-4 and equal
            line += f"; the same sets at FDR 0.05: {'yes' if equal else 'NO'} ({int(answers[name][1].sum()):,} genes)"
        print(line)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(_main())
