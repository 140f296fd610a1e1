"""Trains the same network on the same cells with arc-state and with pertcast, in turns, and prints the ratios.

Simulated counts (18,080 genes), `state_sm`, 8 sets of 128: once on 2,000 highly variable genes, once on all genes in
and out. Ours prepares its store within the time; arc-state's own preprocessing is not counted. Prints, too, how near
the step comes to the rate at which the machine multiplies matrices.

arc-state sets torch's float32 products to "medium", which hands them to oneDNN and allows it bfloat16 inside, where the
CPU is made for that. Ours is measured in float32, its default, and in bf16, which it must be asked for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.flops import matmul_rate, step_flops
from benchmarks.packing import where_and_when

from pertcast.models.run_folder import open_run
from pertcast.models.spec import StateSpec

HERE = Path(__file__).parent
SETS = 8
PRECISIONS = ("fp32", "bf16")
EXPERIMENT = """\
[datasets]
simulated = "{data}"
[training]
simulated = "train"
[columns]
cell_type = "cell_type"
batch = "batch"
[model]
preset = "state_sm"
[train]
match = "context"
[submission]
genes = "{genes}"
"""
SPLIT = """\
[datasets]
simulated = "{folder}"
[training]
simulated = "train"
[zeroshot]
[fewshot]
"""


class Measured(NamedTuple):
    """Wall seconds of a command and to the first step, the median step of the later half, peak bytes."""

    whole: float
    first: float
    warm: float
    peak_bytes: int


def measure(command: Sequence[str], times: Path) -> Measured:
    """Run a command to its end; its output goes to a log beside `times`."""
    environment = {**os.environ, "WANDB_MODE": "disabled"}
    with times.with_suffix(".log").open("w") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        whole = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    ends = json.loads(times.read_text())
    steps = [after - before for before, after in itertools.pairwise(ends)]
    return Measured(whole, ends[0], statistics.median(steps[len(steps) // 2 :]), usage.ru_maxrss * 1024)


def simulate_data(out: Path, shared: Path, state: str) -> None:
    """Write the counts, and what arc-state's own preprocessing makes of them."""
    import anndata as ad
    import torch

    names = list(torch.load(shared / "ESM2_pert_features_vcc150.pt", weights_only=True))[:20]
    (out / "targets.txt").write_text("".join(f"{name}\n" for name in names))
    genes = str(shared / "vcc2025" / "gene_names.csv")
    size = ["--cells-per-target", "256", "--controls", "3000"]
    command = [sys.executable, str(HERE / "simulate.py"), "--out", str(out / "counts.h5ad"), "--genes", genes]
    subprocess.run([*command, "--targets", str(out / "targets.txt"), *size], check=True)
    cells = ad.read_h5ad(out / "counts.h5ad")
    cells.obs["cell_type"] = "H1"
    cells.write_h5ad(out / "counts.h5ad")
    (out / "state").mkdir()
    preprocess = [state, "-m", "state", "tx", "preprocess_train", "--adata", str(out / "counts.h5ad")]
    subprocess.run([*preprocess, "--output", str(out / "state" / "cells.h5ad"), "--num_hvgs", "2000"], check=True)
    (out / "split.toml").write_text(SPLIT.format(folder=out / "state"))
    (out / "experiment.toml").write_text(EXPERIMENT.format(data=out / "counts.h5ad", genes=genes))


def train_state(out: Path, python: str, steps: int, *, hvg: bool) -> Measured:
    """Train with arc-state."""
    data = {
        "toml_config_path": out / "split.toml",
        "embed_key": "X_hvg" if hvg else "null",
        "output_space": "gene" if hvg else "all",
        "num_workers": 4,
        "pin_memory": "false",
        "batch_col": "batch",
        "pert_col": "target_gene",
        "cell_type_key": "cell_type",
        "control_pert": "non-targeting",
    }
    training = {"batch_size": SETS, "max_steps": steps, "val_freq": 100_000, "ckpt_every_n_steps": 100_000}
    options = [f"data.kwargs.{key}={value}" for key, value in data.items()]
    options += [f"training.{key}={value}" for key, value in training.items()]
    options += ["use_wandb=false", f"output_dir={out / 'state-runs'}", "name=run", "overwrite=true", "model=state_sm"]
    times = out / "state.json"
    return measure([python, str(HERE / "state_child.py"), str(times), "tx", "train", *options], times)


def train_ours(out: Path, steps: int, *, hvg: bool, precision: str) -> Measured:
    """Prepare and train with pertcast, from nothing."""
    for name in ("store", "run"):
        shutil.rmtree(out / name, ignore_errors=True)
    genes = "hvg" if hvg else "genes"
    options = [f"train.steps={steps}", "train.val_every=100000", f"model.input={genes}", f"model.output={genes}"]
    options.append(f"train.precision={precision}")
    times = out / "ours.json"
    paths = [str(times), *(str(out / name) for name in ("experiment.toml", "store", "run"))]
    return measure([sys.executable, str(HERE / "train_child.py"), *paths, *options], times)


def compare(name: str, out: Path, python: str, steps: int, *, hvg: bool, rounds: int) -> None:
    """Run all in turns and print a table of medians and ratios, and the share of the machine's rate."""
    peers: list[Measured] = []
    ours: dict[str, list[Measured]] = {precision: [] for precision in PRECISIONS}
    rates = []
    for _ in range(rounds):
        peers.append(train_state(out, python, steps, hvg=hvg))
        for precision, measured in ours.items():
            measured.append(train_ours(out, steps, hvg=hvg, precision=precision))
        rates.append(matmul_rate())
    columns = " | ".join(f"pertcast, {precision} | ratio" for precision in ours)
    print(f"\n| {name}, {steps} steps | state tx train | {columns} |\n|---|---|" + "---|---|" * len(ours))
    labels = ("whole command, s", "to the first step, s", "a warm step, s", "peak memory, GB")
    for label, field, unit in zip(labels, Measured._fields, (1, 1, 1, 1e9), strict=True):
        peer, *own = (statistics.median(getattr(one, field) for one in each) / unit for each in (peers, *ours.values()))
        print(f"| {label} | {peer:.2f} | " + " | ".join(f"{value:.2f} | {value / peer:.2f}" for value in own) + " |")
    for who, each in {"state tx train": peers, **ours}.items():
        print(f"\n{who}, each round: " + ", ".join(f"{one.whole:.1f} s, a step {one.warm:.2f} s" for one in each))
    spec = open_run(out / "run").spec
    assert isinstance(spec, StateSpec)
    work = step_flops(spec, num_sets=SETS)
    reached, machine = work / statistics.median(one.warm for one in ours["fp32"]), max(rates)
    print(
        f"\nA step: {work / 1e9:.0f} GFLOP of products, in fp32 at {reached / 1e9:.0f} GFLOP/s; the machine's best "
        f"fp32 product: {machine / 1e9:.0f} GFLOP/s; share {reached / machine:.0%}.",
        flush=True,
    )


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state-python", required=True, help="a Python that has arc-state")
    parser.add_argument("--shared", type=Path, required=True, help="the folder of the challenge's small files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, nargs=2, default=(40, 10), help="with 2,000 genes, with all genes; 0: not")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "experiment.toml").exists():
        simulate_data(out, arguments.shared.absolute(), arguments.state_python)
    print(where_and_when())
    names = ("2,000 highly variable genes", "18,080 genes in and out")
    for name, steps, hvg in zip(names, arguments.steps, (True, False), strict=True):
        if steps:
            compare(name, out, arguments.state_python, steps, hvg=hvg, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
