"""Reads random cell sets from the store and with cell-load, in turns; then opens a large store and trains on it.

Simulated counts (18,080 genes, about 7,000 stored values a cell), batches of eight sets of 128 perturbed cells and as
many controls, from files that are not in the page cache, to dense float32 log1p tensors: 227,360 cells, which are the
same 8,120 over and over, in 28 files of their own for cell-load and in one store for ours.

    python -m benchmarks.loader --state-python PYTHON_WITH_CELL_LOAD --shared ../shared/data --out out/loader
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from benchmarks.against_state import simulate_data
from benchmarks.packing import measure, where_and_when

HERE = Path(__file__).parent
BATCHES = 6
COPIED_CELLS = 2 * 32 * 128
LARGE_CELLS = 221_000
BARS = {"cells per second": 20.0, "of a copy": 0.5, "open, s": 1.0, "training, GB": 3.0}


def _child(command: Sequence[str]) -> dict[str, float]:
    found = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=HERE.parent
    )
    result: dict[str, float] = json.loads(found.stdout.splitlines()[-1].rpartition("\r")[2])
    return result


def compare(out: Path, python: str, rounds: int) -> tuple[str, float]:
    """Return a table of cells per second, and the ratio of medians against the dataset in one process."""
    ours = [sys.executable, "-m", "benchmarks.loader_child", str(out / "large.toml"), str(out / "large-store")]
    peer = [python, str(HERE / "cell_load_child.py"), str(out / "large-split.toml")]
    commands = {
        "cell-load, one process": [*peer, "0", str(BATCHES)],
        "pertcast": [*ours, str(BATCHES)],
        "cell-load, two workers": [*peer, "2", str(BATCHES)],
    }
    rates: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            found = _child(command)
            rates[name].append(found["cells"] / found["seconds"])
            print(f"{name:<24} {rates[name][-1]:10,.0f} cells/s", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    rows = ["| | cells a second (each run) | median | ours is faster by |", "|---|---|---|---|"]
    for name, values in rates.items():
        each = ", ".join(f"{value:,.0f}" for value in values)
        rows.append(f"| {name} | {each} | {medians[name]:,.0f} | {medians['pertcast'] / medians[name]:.1f} |")
    return "\n".join(rows), medians["pertcast"] / medians["cell-load, one process"]


def copies(out: Path, python: str, rounds: int) -> tuple[str, float]:
    """Return a table of GB a second from the page cache, and our reader's share of the rate of a copy."""
    import torch
    from scipy import sparse

    from pertcast.data.inputs import CellSource, PackedCells
    from pertcast.data.store import Store
    from pertcast.files.resources import available_cpus

    store, random, threads = Store.open(out / "store"), np.random.default_rng(0), available_cpus()
    source = CellSource(store)
    source.place(torch.device("cpu"), "packed")
    values, _ = store.stored_values(None)
    whole = values.read(np.arange(store.num_cells)).tocsr()
    matrix = sparse.csr_matrix((whole.data, whole.indices, whole.indptr), shape=whole.shape)
    batches = [random.integers(0, store.num_cells, COPIED_CELLS) for _ in range(BATCHES)]
    pool = ThreadPoolExecutor(threads)

    def plain(to: np.ndarray, of: np.ndarray) -> None:
        bounds = np.linspace(0, len(of), threads + 1).astype(int)
        list(pool.map(lambda first, last: np.copyto(to[first:last], of[first:last]), bounds[:-1], bounds[1:]))

    def seconds(work: Callable[[np.ndarray], object]) -> float:
        start = time.perf_counter()
        for rows in batches:
            work(rows)
        return (time.perf_counter() - start) / len(batches)

    packed = source.fetch(batches[0])
    assert isinstance(packed, PackedCells)
    size = sum(part.numel() * part.element_size() for part in (packed.cells.columns, packed.cells.values))
    of, to = np.ones(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
    kinds: dict[str, Callable[[np.ndarray], object]] = {
        f"NumPy copy of as many bytes, {threads} threads": lambda _rows: plain(to, of),
        f"pertcast's reader, {threads} threads": source.fetch,
        "pertcast's reader until now: CSR, normalised": store.csr,
        "scipy, `X[rows]` in memory": lambda rows: matrix[rows],
    }
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds + 1):
        for name, work in kinds.items():
            found[name].append(seconds(work))
    times = {name: statistics.median(each[1:]) for name, each in found.items()}
    peer = [python, str(HERE / "cell_load_child.py"), str(out / "split.toml"), "0", str(BATCHES), "warm"]
    cell_load = _child(peer)
    times["cell-load, one process, dense"] = cell_load["seconds"] / cell_load["cells"] * COPIED_CELLS
    rows = [f"| {COPIED_CELLS:,} random cells, {size / 1e6:,.0f} MB | ms | GB/s | cells/s |", "|---|---|---|---|"]
    for name, each in times.items():
        rows.append(f"| {name} | {1e3 * each:,.0f} | {size / each / 1e9:.2f} | {COPIED_CELLS / each:,.0f} |")
    plainly, ours, *_ = times.values()
    return "\n".join(rows), plainly / ours


def make_large(out: Path) -> Path:
    """Prepare a store of at least 221,000 cells, and the copies that cell-load reads."""
    from pertcast.data.store import Store

    folder, copies, store = out / "many", out / "many-state", out / "large-store"
    number_of_files = -(-LARGE_CELLS // Store.open(out / "store").num_cells)
    copies.mkdir(exist_ok=True)
    for number in range(number_of_files):
        if not (copies / f"part_{number:02d}.h5ad").exists():
            shutil.copyfile(out / "state" / "cells.h5ad", copies / f"part_{number:02d}.h5ad")
    (out / "large-split.toml").write_text((out / "split.toml").read_text().replace(str(out / "state"), str(copies)))
    if store.exists():
        return store
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number in range(number_of_files):
        os.link(out / "counts.h5ad", folder / f"part_{number:02d}.h5ad")
    text = (out / "experiment.toml").read_text().replace(str(out / "counts.h5ad"), str(folder))
    (out / "large.toml").write_text(text)
    prepare = [sys.executable, "-m", "pertcast", "prepare", str(out / "large.toml"), "--out", str(store)]
    subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
    return store


def large(out: Path, steps: int) -> tuple[str, float, float]:
    """Return a table, the seconds that a large store takes to open, and the peak memory of training on it, in GB."""
    from pertcast.data.store import Store

    folder = make_large(out)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        store = Store.open(folder)
        seconds.append(time.perf_counter() - start)
    options = [f"train.steps={steps}", "train.val_every=100000", "model.input=hvg", "model.output=hvg"]
    sets = [part for option in options for part in ("--set", option)]
    command = [sys.executable, "-m", "pertcast", "train", str(out / "large.toml"), "--store", str(folder)]
    shutil.rmtree(out / "large-run", ignore_errors=True)
    found = measure([*command, "--out", str(out / "large-run"), *sets])
    if found.code:
        raise subprocess.CalledProcessError(found.code, command)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
    opened, peak = statistics.median(seconds), found.peak_bytes / 1e9
    rows = [
        "| | |",
        "|---|---|",
        f"| cells, bytes | {store.num_cells:,}, {size:.1f} GB |",
        f"| open, s (median of 5) | {opened:.3f} |",
        f"| train `state_sm`, 2,000 genes, {steps} steps of 8 sets of 128: peak memory, GB | {peak:.2f} |",
    ]
    return "\n".join(rows), opened, peak


def main() -> None:
    """Parse the command line, run, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--state-python", required=True, help="a Python that has arc-state and cell-load")
    parser.add_argument("--shared", type=Path, required=True, help="the folder of the challenge's small files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", choices=("copies", "sets", "large"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "loader.md")
    given = parser.parse_args()
    out = given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "experiment.toml").exists():
        simulate_data(out, given.shared.absolute(), given.state_python)
    if not (out / "store").exists():
        prepare = [sys.executable, "-m", "pertcast", "prepare", str(out / "experiment.toml")]
        subprocess.run([*prepare, "--out", str(out / "store")], check=True, stdout=subprocess.DEVNULL)
    if given.only != "copies":
        make_large(out)
    text = f"# Reading cell sets\n\n{where_and_when()}\n{(__doc__ or '').split(os.linesep * 2)[1]}\n"
    if given.only in (None, "copies"):
        table, ratio = copies(out, given.state_python, given.rounds)
        text += f"\n{table}\n\nOf the rate of a copy: {ratio:.2f} (bar: at least {BARS['of a copy']:g}).\n"
    if given.only in (None, "sets"):
        table, ratio = compare(out, given.state_python, given.rounds)
        text += f"\n{table}\n\nRatio of medians: {ratio:.1f} (bar: at least {BARS['cells per second']:g}).\n"
    if given.only in (None, "large"):
        table, opened, peak = large(out, given.steps)
        text += f"\n{table}\n\nOpened in {opened:.3f} s (bar: under {BARS['open, s']:g} s); "
        text += f"trained in {peak:.2f} GB (bar: below {BARS['training, GB']:g} GB).\n"
    given.results.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
