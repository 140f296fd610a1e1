"""Training alone, and beside one process that keeps a processor busy: the whole command, in turn.

python -m benchmarks.busy --out out/busy [--steps 20] [--rounds 3]

Threads that spin while they wait lose far more to a busy neighbour than it takes: a step waits for the slowest thread,
which waits for a processor. The last lines are ratios beside / alone, with waiting threads that sleep (as the program
sets it) and with threads that spin (OMP_WAIT_POLICY=ACTIVE).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pertcast

EXPERIMENT = """
[datasets]
h1 = "{cells}"
[training]
h1 = "train"
[columns]
context = "H1"
batch = "batch"
[train]
steps = {steps}
val_every = 1000
checkpoint_every = 1000
"""
BUSY = [sys.executable, "-c", "while True: pass"]


def seconds_of(folder: Path, environment: dict[str, str]) -> float:
    """Return the wall time of one training command."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    command = [sys.executable, "-m", "pertcast", "train", "e.toml", "--store", "store", "--out", "run"]
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, env={**os.environ, **environment}, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Print the medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "e.toml").write_text(
        EXPERIMENT.format(cells=Path(pertcast.__file__).parent / "assets" / "h1_vcc2025.h5ad", steps=options.steps)
    )
    prepare = [sys.executable, "-m", "pertcast", "prepare", "e.toml", "--out", "store"]
    subprocess.run(prepare, cwd=options.out, check=True, capture_output=True)
    policies = {"sleeping": {}, "spinning": {"OMP_WAIT_POLICY": "ACTIVE"}}
    times: dict[tuple[str, bool], list[float]] = {}
    for _ in range(options.rounds):
        for name, environment in policies.items():
            times.setdefault((name, False), []).append(seconds_of(options.out, environment))
            with subprocess.Popen(BUSY) as busy:
                times.setdefault((name, True), []).append(seconds_of(options.out, environment))
                busy.kill()
    for name in policies:
        alone, beside = (statistics.median(times[name, busy]) for busy in (False, True))
        print(f"{name}: alone {alone:.1f} s, beside a busy process {beside:.1f} s, ratio {beside / alone:.2f}")


if __name__ == "__main__":
    main()
