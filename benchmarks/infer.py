"""Generates cells with `state tx infer` and with pertcast, from one checkpoint of `state tx train`, in turns.

Simulated log1p cells (18,080 genes, 3,000 controls), `state_sm` on all genes in and out, 20 targets. Both make as many
cells from the same control cells, and write them to disk; `state tx infer` predicts the control cells, too. Ours reads
its cells from a store and its network from an imported run, both made once; their seconds stand beside.

    python -m benchmarks.infer --state-python PYTHON_WITH_ARC_STATE --shared ../shared/data --out out/infer
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.against_state import simulate_data, train_state
from benchmarks.packing import Measured, in_turns, measure, table, where_and_when

HERE = Path(__file__).parent
CELLS, TRAIN_STEPS = 10_000, 3
# the first has as many cells of a target as fill whole batches, so that memory can be compared
MORE_CELLS = (20_000, 60_000)
PEER = "state tx infer"
OURS = "pertcast generate"
BARS = {"wall": 0.40, "memory": 0.5}
_IMPORTED, _STORE = "infer-run", "infer-store"


def write_inputs(out: Path, cells: int) -> None:
    """Write the template that `state tx infer` reads, and the target list that ours reads."""
    import anndata as ad
    import numpy as np
    import pandas as pd

    names = (out / "targets.txt").read_text().split()
    each = cells // len(names)
    (out / f"targets-{cells}.csv").write_text("target_gene,n_cells\n" + "".join(f"{name},{each}\n" for name in names))
    if cells != CELLS:
        return
    source = ad.read_h5ad(out / "state" / "cells.h5ad")
    controls = np.flatnonzero(source.obs["target_gene"] == "non-targeting")
    rows = np.concatenate([controls, np.random.default_rng(0).choice(controls, each * len(names))])
    template = ad.AnnData(source.X[rows], obs=source.obs.iloc[rows].copy(), var=source.var[[]])
    template.obs["target_gene"] = pd.Categorical(["non-targeting"] * len(controls) + list(np.repeat(names, each)))
    template.obs_names = [f"c{number}" for number in range(len(rows))]
    template.write_h5ad(out / "template.h5ad")


def set_up(out: Path, python: str) -> dict[str, float]:
    """Train with arc-state, import its run, prepare a store; return the seconds of what ours takes."""
    run = out / "state-runs" / "run"
    if not (run / "checkpoints" / "final.ckpt").exists():
        train_state(out, python, TRAIN_STEPS, hvg=False)
    for cells in (CELLS, *MORE_CELLS):
        write_inputs(out, cells)
    text = (out / "experiment.toml").read_text().replace(str(out / "counts.h5ad"), str(out / "state" / "cells.h5ad"))
    (out / "infer.toml").write_text(text)
    seconds = {}
    pertcast = [sys.executable, "-m", "pertcast"]
    for name, command in {
        "import": [*pertcast, "import", str(run), "--out", str(out / _IMPORTED)],
        "prepare": [*pertcast, "prepare", str(out / "infer.toml"), "--out", str(out / _STORE)],
    }.items():
        shutil.rmtree(command[-1], ignore_errors=True)
        seconds[name] = _well(measure(command), command).seconds
    return seconds


def _well(found: Measured, command: Sequence[str]) -> Measured:
    if found.code:
        raise subprocess.CalledProcessError(found.code, command)
    return found


def generate_command(out: Path, cells: int) -> list[str]:
    """Return our command for a number of cells."""
    rules = ("submission.rules.num_targets=20", "submission.rules.max_cells=200000", "submission.num_controls=1")
    sets = [part for rule in rules for part in ("--set", rule)]
    inputs = ["--store", str(out / _STORE), "--targets", str(out / f"targets-{cells}.csv")]
    command = [sys.executable, "-m", "pertcast", "generate", str(out / _IMPORTED), *inputs]
    return [*command, "--out", str(out / "parts"), *sets]


def infer_command(out: Path, python: str) -> list[str]:
    """Return arc-state's command."""
    model, template, made = (str(out / name) for name in ("state-runs/run", "template.h5ad", "inferred.h5ad"))
    command = [python, "-m", "state", "tx", "infer", "--adata", template, "--model-dir", model, "--output", made]
    return [*command, "--pert-col", "target_gene", "--celltype-col", "cell_type", "--batch-col", "batch", "--quiet"]


def main() -> None:
    """Parse the command line, run, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--state-python", required=True, help="a Python that has arc-state")
    parser.add_argument("--shared", type=Path, required=True, help="the folder of the challenge's small files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--set-up-only", action="store_true")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "infer.md")
    given = parser.parse_args()
    # as installed, arc-state cannot read its own checkpoints
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    out = given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "experiment.toml").exists():
        simulate_data(out, given.shared.absolute(), given.state_python)
    once = set_up(out, given.state_python)
    if given.set_up_only:
        return

    def clean() -> None:
        shutil.rmtree(out / "parts", ignore_errors=True)
        (out / "inferred.h5ad").unlink(missing_ok=True)

    commands = {PEER: infer_command(out, given.state_python), OURS: generate_command(out, CELLS)}
    found = in_turns(commands, rounds=given.rounds, clean=clean)
    clean()
    more = {}
    for cells in MORE_CELLS:
        more[cells] = measure(generate_command(out, cells))
        clean()
    for name, runs in {**found, "more cells": list(more.values())}.items():
        for run in runs:
            _well(run, [name])
    wall = {name: statistics.median(run.seconds for run in runs) for name, runs in found.items()}
    peak = {name: max(run.peak_bytes for run in runs) for name, runs in found.items()}
    peer_rows = table({**found, **{f"{OURS}, {cells:,} cells": [run] for cells, run in more.items()}})
    shown = ", ".join(f"{run.peak_bytes / 1e9:.2f} GB at {cells:,} cells" for cells, run in more.items())
    lines = [
        "# Generating cells from a checkpoint of arc-state",
        f"{where_and_when()}\n{(__doc__ or '').split(chr(10) * 2)[1]}",
        f"{CELLS:,} cells:\n\n{peer_rows}",
        f"Wall time, ratio of medians: {wall[OURS] / wall[PEER]:.2f} (bar: at most {BARS['wall']:g}, goal 0.33).\n"
        f"Peak memory, ratio: {peak[OURS] / peak[PEER]:.2f} (bar: at most {BARS['memory']:g}); "
        f"{shown}: batches are of "
        f"up to 1,024 cells, and {CELLS:,} cells of 20 targets make batches of half that size.",
        f"Once: import {once['import']:.1f} s, prepare {once['prepare']:.1f} s.",
    ]
    text = "\n\n".join(lines) + "\n"
    given.results.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
