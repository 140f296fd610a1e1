"""Times `pertcast score` beside cell-eval (`run --profile vcc`) on simulated cells at the real gene list.

Two files of whole counts: 50 targets of 200 cells and 4,000 controls, 18,080 genes (fewer with --cells). Each run is a
process of its own; what pertcast keeps of the truth is dropped between runs, and timed once more as kept. Prints the
ratio and the largest difference of a metric of a target; exits with 1 where the ratio is above 0.10 or they differ by
more than 1e-6.

    python benchmarks/score.py --out out/score --peer python-with-cell-eval
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["run_official", "run_ours"]

NAMES = {"mae": "mae", "pds": "discrimination_score_l1", "des": "overlap_at_N"}
BAR = 0.10


def _timed(command: list[str], environment: dict[str, str], log: Path) -> tuple[float, int]:
    """Return wall seconds and peak resident bytes of a command that must succeed."""
    start = time.perf_counter()
    with log.open("w") as stream:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        print(log.read_text()[-2000:])
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def run_ours(predicted: Path, real: Path, out: Path) -> tuple[float, int]:
    """Score with pertcast; the JSON goes to ``out/ours.json``."""
    command = "import sys; from pertcast.cli.app import main; main(sys.argv[1:])"
    arguments = ["score", str(predicted), str(real), "--json"]
    log = out / "ours.log"
    took = _timed([sys.executable, "-c", command, *arguments], {"PERTCAST_CACHE": str(out / "cache")}, log)
    text = log.read_text()
    (out / "ours.json").write_text(text[text.index("{") : text.rindex("}") + 1])
    return took


def run_official(predicted: Path, real: Path, out: Path, peer: str) -> tuple[float, int]:
    """Score with cell-eval; the metrics of targets go to ``out/official/results.csv``."""
    arguments = ["run", "-ap", str(predicted), "-ar", str(real), "--pert-col", "target_gene", "--profile", "vcc"]
    command = [peer, "-c", "from cell_eval.__main__ import main; main()", *arguments]
    return _timed([*command, "--num-threads", "2", "-o", str(out / "official")], {}, out / "official.log")


def _difference(out: Path) -> float:
    ours = json.loads((out / "ours.json").read_text())["targets"]
    with (out / "official" / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    if {row["perturbation"] for row in rows} != set(ours):
        return float("inf")
    worst = 0.0
    for row in rows:
        for name, official in NAMES.items():
            worst = max(worst, abs(ours[row["perturbation"]][name] - float(row[official])))
    return worst


def _main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer", default=sys.executable, help="a Python with cell-eval")
    parser.add_argument("--cells", type=int, default=200, help="cells of each of 50 targets")
    parser.add_argument("--controls", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=2, help="how often A and B take turns")
    given = parser.parse_args()
    shared = (
        Path(os.environ.get("PERTCAST_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "vcc2025"
    )
    genes = shared / "gene_names.csv"
    with (shared / "pert_counts_Validation.csv").open() as stream:
        targets = [row["target_gene"] for row in csv.DictReader(stream)]
    given.out.mkdir(parents=True, exist_ok=True)
    paths = [given.out / f"{name}_{given.cells}_{given.controls}.h5ad" for name in ("predicted", "real")]
    for seed, path in enumerate(paths):
        if not path.exists():
            sizes = ["--cells-per-target", str(given.cells), "--controls", str(given.controls), "--seed", str(seed)]
            (given.out / "targets.txt").write_text("\n".join(targets))
            lists = ["--genes", str(genes), "--targets", str(given.out / "targets.txt"), "--out", str(path)]
            script = str(Path(__file__).with_name("simulate.py"))
            subprocess.run([sys.executable, script, *lists, *sizes], check=True)
    predicted, real = paths
    run_ours(predicted, real, given.out)  # compiles, once on a machine
    ours, official, kept = [], [], []
    for _ in range(given.rounds):
        shutil.rmtree(given.out / "cache", ignore_errors=True)
        ours.append(run_ours(predicted, real, given.out))
        kept.append(run_ours(predicted, real, given.out))
        official.append(run_official(predicted, real, given.out, given.peer))
    num_cells = 50 * given.cells + given.controls
    print(f"{platform.machine()}, {os.cpu_count()} cores; {num_cells:,} cells on each side")
    for name, runs in (
        ("pertcast score", ours),
        ("the same, truth kept", kept),
        ("cell-eval run --profile vcc", official),
    ):
        seconds = ", ".join(f"{took:.1f}" for took, _ in runs)
        print(f"{name:<30}{seconds:>20} s{max(peak for _, peak in runs) / 1e9:>8.2f} GB")
    ratio: float = min(took for took, _ in ours) / min(took for took, _ in official)
    difference = _difference(given.out)
    print(f"ratio {ratio:.3f} (bar {BAR}); largest difference of a metric of a target {difference:.2g}")
    return 0 if ratio <= BAR and difference <= 1e-6 else 1


if __name__ == "__main__":
    sys.exit(_main())
