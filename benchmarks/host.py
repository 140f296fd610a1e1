"""Measures the host's work in a training step: everything but the network, which is made as small as it gets.

Each row is one training of a network of width 8 with one layer, in a process of its own; its time is the median between
two reported steps. Sets have 16 cells, not 128: attention and the energy distance take 128 x 128 distances for each
set, which a GPU does and a CPU would spend the step on (`--set-size 128` shows it). So on a panel of 64 genes only the
loop's own work is left: drawing and reading sets, losses, optimiser and bookkeeping. On 2,000 highly variable genes and
on all 18,080, a CPU also makes cells dense. Beside it runs the code of an earlier commit, in turns.

    python -m benchmarks.host --out out/host                    both, as a table
    python -m benchmarks.host --out out/host --old none --json  this code alone, as JSON
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OLD = "9b0fc48"
"""The last commit whose training read its cells from the disk in every step."""

_TOML = """
[datasets]
simulated = "cells.h5ad"
[training]
simulated = "train"
[columns]
batch = "batch"
context = "H1"
[prepare]
num_hvgs = {num_hvgs}
[model]
hidden = 8
layers = 1
heads = 2
feedforward = 16
encoder_layers = 1
decoder_layers = 1
set_size = {set_size}
{model}
[train]
sets_per_step = {sets}
steps = {steps}
val_every = 1000000
checkpoint_every = 1000000
precision = "fp32"
"""


class Input(NamedTuple):
    """What a network reads and predicts."""

    num_genes: int
    num_hvgs: int
    umi: float
    steps: int
    model: str = ""


INPUTS = {
    "panel": Input(64, 16, 2_000, 400),
    "hvg": Input(18_080, 2_000, 54_000, 100, 'input = "hvg"\noutput = "hvg"'),
    "genes": Input(18_080, 2_000, 54_000, 30),
}
SETS = (8, 32)


def write_data(folder: Path, given: Input) -> None:
    """Write simulated counts: 40 targets of 100 cells and 2,000 controls."""
    from benchmarks.simulate import simulate

    folder.mkdir(parents=True, exist_ok=True)
    genes = [f"gene{number}" for number in range(given.num_genes)]
    simulate(
        folder / "cells.h5ad",
        genes=genes,
        targets=genes[:40],
        cells_per_target=100,
        num_controls=2_000,
        num_batches=4,
        umi=given.umi,
    )


def step_milliseconds(experiment: Path, out: Path) -> float:
    """Prepare, train, and return the median time between two steps after the first fifth; runs in a child process."""
    from pertcast.config import load_experiment
    from pertcast.data.prepare import prepare
    from pertcast.progress import SILENT
    from pertcast.train import train

    ended: list[float] = []

    class Clock:
        note, table = SILENT.note, SILENT.table

        @contextmanager
        def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[object]:  # noqa: ARG002
            def advance(amount: int, detail: str = "") -> None:  # noqa: ARG001
                if unit == "steps" and amount:
                    ended.append(time.perf_counter())

            yield advance

    loaded = load_experiment(experiment)
    store = prepare(loaded, out / "store")
    train(loaded, store, out / "run", progress=Clock())  # type: ignore[arg-type]
    times = [1e3 * (after - before) for before, after in itertools.pairwise(ended)]
    return statistics.median(times[len(times) // 5 :])


def measure(source: Path, folder: Path, given: Input, *, sets: int, set_size: int, name: str) -> float:
    """Return the milliseconds of a step with the code in `source`, measured in a fresh process."""
    experiment = folder / f"{name}-{sets}.toml"
    text = _TOML.format(num_hvgs=given.num_hvgs, model=given.model, sets=sets, set_size=set_size, steps=given.steps)
    experiment.write_text(text)
    out = folder / f"{name}-{sets}-{time.time_ns()}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source / "src"), str(ROOT)])}
    command = [sys.executable, "-m", "benchmarks.host", "--child", str(experiment), "--out", str(out)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {sets} sets: the training failed\n{done.stderr}")
    return float(done.stdout.split()[-1])


def old_source(commit: str, folder: Path) -> Path:
    """Put the source of a commit into a folder, and return the folder."""
    command = ["git", "-C", str(ROOT), "archive", commit, "src"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"--old {commit}: {done.stderr.decode().strip()}; fetch the whole history, or give --old none")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row for each input and number of sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for data, stores and runs")
    parser.add_argument("--old", default=OLD, help='commit to compare with, or "none" (default: %(default)s)')
    parser.add_argument("--set-size", type=int, default=16, help="cells in a set (default: %(default)s)")
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=list(INPUTS))
    parser.add_argument("--rounds", type=int, default=2, help="trainings of each side, in turns (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print a list of rows as JSON instead of a table")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(step_milliseconds(options.child, options.out))
        return
    out = options.out.resolve()
    sources = {"ms": ROOT}
    if options.old != "none":
        sources = {"old_ms": old_source(options.old, out / "old"), **sources}
    rows = []
    for name in options.inputs:
        write_data(out / name, INPUTS[name])
        for sets in SETS:
            times: dict[str, list[float]] = {side: [] for side in sources}
            for _ in range(options.rounds):
                for side, source in sources.items():
                    size = options.set_size
                    times[side].append(measure(source, out / name, INPUTS[name], sets=sets, set_size=size, name=side))
            row = {side: round(statistics.median(measured), 2) for side, measured in times.items()}
            rows.append({"input": name, "sets": sets, **row})
            if not options.json:
                old = f"{row['old_ms']:10.2f} {row['ms'] / row['old_ms']:8.2f}" if "old_ms" in row else ""
                print(f"{name:6} {sets:3} sets {row['ms']:10.2f} ms {old}", flush=True)
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
