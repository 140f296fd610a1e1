"""Takes the whole season-2025 path at the real gene list, and prints wall time and peak memory of each stage.

Simulated training counts (targets that the ESM2 file covers, 18,080 genes), the real target list under a cap that makes
alpha < 1, a few training steps, then generate, assemble, check, pack and unpack: each a process of its own, so that its
peak resident memory is its own. Ends with exit code 1 where a stage fails or needs more memory than the bar.

    python benchmarks/season2025.py --out out/bench
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pertcast.data.features import read_vectors
from pertcast.errors import DataError

__all__ = ["Stage", "run_stage"]

BAR_BYTES = 3_000_000_000
EXPERIMENT = """\
[datasets]
simulated = "training.h5ad"
[training]
simulated = "train"
[columns]
context = "H1"
batch = "batch"
[features]
kind = "file"
path = "{features}"
missing = "nearest"
[model]
preset = "{preset}"
input = "genes"
output = "genes"
[train]
steps = {steps}
val_every = {steps}
max_val_sets = 8
checkpoint_every = {steps}
[submission]
season = "vcc2025"
genes = "{shared}/vcc2025/gene_names.csv"
targets = "{shared}/vcc2025/pert_counts_Validation.csv"
[submission.rules]
max_cells = {cap}
"""


class Stage(NamedTuple):
    """What a stage took: wall seconds, and the peak resident bytes of its process."""

    name: str
    seconds: float
    peak_bytes: int


def run_stage(name: str, command: Sequence[str]) -> Stage:
    """Run a command to its end, its output to the terminal.

    Raises
    ------
    subprocess.CalledProcessError
        If it does not exit with 0.
    """
    print(f"\n== {name}", flush=True)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    unit = 1 if sys.platform == "darwin" else 1024
    return Stage(name, time.perf_counter() - start, usage.ru_maxrss * unit)


def _write_targets(path: Path, shared: Path, num_targets: int) -> None:
    """Write the first targets that the ESM2 file covers."""
    known = set((shared / "vcc2025" / "gene_names.csv").read_text().split())
    covered = [name for name in read_vectors(shared / "ESM2_pert_features_vcc150.pt") if name in known]
    path.write_text("".join(f"{name}\n" for name in covered[:num_targets]))


def _stages(given: argparse.Namespace, shared: Path) -> list[Stage]:
    out = given.out
    experiment = out / "experiment.toml"
    features = shared / "ESM2_pert_features_vcc150.pt"
    experiment.write_text(
        EXPERIMENT.format(features=features, preset=given.preset, steps=given.steps, shared=shared, cap=given.cap)
    )
    lists = ["--genes", f"{shared}/vcc2025/gene_names.csv", "--targets", f"{shared}/vcc2025/pert_counts_Validation.csv"]
    rules = [*lists, "--rule", f"max_cells={given.cap}"]
    prediction, archive = str(out / "prediction.h5ad"), str(out / "prediction.vcc")
    _write_targets(out / "training_targets.txt", shared, given.targets)
    simulated = {
        "--genes": shared / "vcc2025" / "gene_names.csv",
        "--targets": out / "training_targets.txt",
        "--cells-per-target": given.cells_per_target,
        "--controls": given.controls,
        "--out": out / "training.h5ad",
    }
    commands = {
        "simulate": [
            str(Path(__file__).with_name("simulate.py")),
            *(str(part) for option in simulated.items() for part in option),
        ],
        "prepare": ["-m", "pertcast", "prepare", str(experiment), "--out", f"{out}/store"],
        "train": ["-m", "pertcast", "train", str(experiment), "--store", f"{out}/store", "--out", f"{out}/run"],
        "generate": ["-m", "pertcast", "generate", f"{out}/run", "--out", f"{out}/parts"],
        "assemble": ["-m", "pertcast", "assemble", f"{out}/parts", "--out", prediction],
        "check": ["-m", "pertcast", "check", prediction, *rules],
        "pack": ["-m", "pertcast", "pack", prediction, *rules, "-o", archive],
        "unpack": ["-m", "pertcast", "unpack", archive, "-o", f"{out}/unpacked.h5ad"],
    }
    return [run_stage(name, command) for name, command in commands.items()]


def _main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", type=int, default=44, help="training targets")
    parser.add_argument("--cells-per-target", type=int, default=128)
    parser.add_argument("--controls", type=int, default=3000)
    parser.add_argument("--preset", default="state_sm")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cap", type=int, default=20_000, help="max_cells; the list asks for 60,751")
    given = parser.parse_args()
    shared = Path(os.environ.get("PERTCAST_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
    if not shared.is_dir():
        raise DataError(f"{shared}: the folder of real data is not there; set PERTCAST_SHARED")
    given.out.mkdir(parents=True, exist_ok=True)
    stages = _stages(given, shared)
    print(f"\n{'stage':<10}{'seconds':>10}{'peak MB':>10}")
    for stage in stages:
        print(f"{stage.name:<10}{stage.seconds:>10.1f}{stage.peak_bytes / 1e6:>10,.0f}")
    most = max(stages, key=lambda stage: stage.peak_bytes)
    below = most.peak_bytes < BAR_BYTES
    verdict = "below" if below else "NOT below"
    print(f"peak {most.peak_bytes / 1e9:.2f} GB ({most.name}): {verdict} {BAR_BYTES / 1e9:.0f} GB")
    return 0 if below else 1


if __name__ == "__main__":
    sys.exit(_main())
