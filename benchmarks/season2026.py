"""Takes the season-2026 path at its real gene number, and prints wall time and peak memory of each stage.

Simulated training counts of one line and control cells of three others (18,533 genes, 20,000 UMI), GO features with
missing ones filled in, a few training steps, then 300 targets in three contexts: generate, assemble, check, pack, and
the official packer's own check (`vcc prep --dry-run`, where PERTCAST_VCC names it). Each stage is a process of its own,
so that its peak resident memory is its own. Ends with exit code 1 where a stage of ours fails or is above the bar.

    python -m benchmarks.season2026 --out out/bench --stages setup            # simulate, prepare, train
    python -m benchmarks.season2026 --out out/bench --stages path             # the rest; 100 of 400 cells a target
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.predictions import find_shared
from benchmarks.season2025 import BAR_BYTES, Stage, run_stage

from pertcast.data.features import read_vectors

__all__ = ["EXPERIMENT"]

CONTEXTS = ("A", "B", "C")
EXPERIMENT = """\
[datasets]
training = "training.h5ad"
A = "A.h5ad"
B = "B.h5ad"
C = "C.h5ad"
[training]
training = "train"
A = "train"
B = "train"
C = "train"
[columns]
context = "sim"
batch = "batch"
[columns.of.A]
context = "A"
[columns.of.B]
context = "B"
[columns.of.C]
context = "C"
[prepare]
val_controls = 0.0
[features]
kind = "file"
path = "{shared}/go_bp_svd256.npz"
missing = "nearest"
[model]
preset = "state_sm"
input = "hvg"
output = "genes"
[train]
steps = 10
val_every = 10
max_val_sets = 8
checkpoint_every = 10
[generate]
scale = "counts"
cells = "{cells}"
[submission]
season = "vcc2026"
genes = "genes.csv"
targets = "{shared}/vcc2026/pert_counts.csv"
[submission.rules]
cells_per_target = {cells_per_target}
"""


def _write_lists(out: Path, shared: Path, num_targets: int) -> None:
    """Write the gene list, a bare copy of it to simulate with, the training targets, and the bundle's manifest."""
    genes = (shared / "vcc2025" / "gene_names.csv").read_text().split()
    genes += [f"FILLER{number}" for number in range(18_533 - len(genes))]
    (out / "genes.csv").write_text("".join(f"{gene}\n" for gene in ("gene_name", *genes)))
    (out / "bare.csv").write_text("".join(f"{gene}\n" for gene in genes))
    with (shared / "vcc2026" / "pert_counts.csv").open(newline="") as stream:
        asked = {row["target_gene"] for row in csv.DictReader(stream)}
    known = [name for name in read_vectors(shared / "go_bp_svd256.npz") if name in set(genes) and name not in asked]
    (out / "targets.txt").write_text("".join(f"{name}\n" for name in known[:num_targets]))
    (out / "no_targets.txt").write_text("")
    (out / "manifest.json").write_text(json.dumps({"contexts": CONTEXTS, "panel_id": "simulated"}))


def _simulations(given: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    out, program = given.out, str(Path(__file__).with_name("simulate.py"))
    jobs = {
        "training": (out / "targets.txt", given.controls),
        **dict.fromkeys(CONTEXTS, (out / "no_targets.txt", 1000)),
    }
    for seed, (name, (targets, controls)) in enumerate(jobs.items()):
        options = {
            "--genes": out / "bare.csv",
            "--targets": targets,
            "--cells-per-target": 128,
            "--controls": controls,
            "--batches": 8,
            "--umi": 20_000,
            "--seed": seed,
            "--out": out / f"{name}.h5ad",
        }
        yield f"simulate {name}", [program, *(str(part) for option in options.items() for part in option)]


def _commands(given: argparse.Namespace, shared: Path) -> Iterator[tuple[str, list[str]]]:
    out, experiment = given.out, str(given.out / "experiment.toml")
    if "setup" in given.stages:
        yield from _simulations(given)
        yield "prepare", ["-m", "pertcast", "prepare", experiment, "--out", f"{out}/store"]
        yield "train", ["-m", "pertcast", "train", experiment, "--store", f"{out}/store", "--out", f"{out}/run"]
    if "path" in given.stages:
        targets = str(shared / "vcc2026" / "pert_counts.csv")
        rules = ["--season", "vcc2026", "--genes", f"{out}/genes.csv", "--targets", targets]
        rules += ["--rule", f"cells_per_target={given.cells_per_target}"]
        prediction = f"{out}/prediction.h5ad"
        yield "generate", ["-m", "pertcast", "generate", f"{out}/run", "--out", f"{out}/parts"]
        yield "assemble", ["-m", "pertcast", "assemble", f"{out}/parts", "--out", prediction]
        yield "check", ["-m", "pertcast", "check", prediction, *rules]
        yield "pack", ["-m", "pertcast", "pack", prediction, *rules, "-o", f"{out}/prediction.vcc"]
        if "PERTCAST_VCC" in os.environ:
            theirs = ["prep", "-i", prediction, "-g", f"{out}/genes.csv", "--perts", targets, "--dry-run"]
            theirs += ["--contexts", ",".join(CONTEXTS), "--cells-per-pert", str(given.cells_per_target)]
            run = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
            yield "vcc prep --dry-run", ["-c", run, os.environ["PERTCAST_VCC"], *theirs]


def _main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", choices=["setup", "path"], default=["setup", "path"])
    parser.add_argument("--cells-per-target", type=int, default=100, help="the season's own is 400")
    parser.add_argument("--cells", default="donors", help="generate.cells")
    parser.add_argument("--targets", type=int, default=32, help="training targets")
    parser.add_argument("--controls", type=int, default=2000, help="control cells of the training line")
    given = parser.parse_args()
    shared = find_shared()
    given.out.mkdir(parents=True, exist_ok=True)
    _write_lists(given.out, shared, given.targets)
    text = EXPERIMENT.format(shared=shared, cells=given.cells, cells_per_target=given.cells_per_target)
    (given.out / "experiment.toml").write_text(text)
    stages: list[Stage] = [run_stage(name, command) for name, command in _commands(given, shared)]
    print("\n| stage | seconds | peak MB |\n|---|---|---|")
    for stage in stages:
        print(f"| {stage.name} | {stage.seconds:.1f} | {stage.peak_bytes / 1e6:,.0f} |")
    most = max((stage for stage in stages if "vcc" not in stage.name), key=lambda stage: stage.peak_bytes)
    below = most.peak_bytes < BAR_BYTES
    print(f"\npeak {most.peak_bytes / 1e9:.2f} GB ({most.name}); the bar is {BAR_BYTES / 1e9:.0f} GB")
    return 0 if below else 1


if __name__ == "__main__":
    sys.exit(_main())
