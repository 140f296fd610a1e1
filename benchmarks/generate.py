"""Times `pertcast generate` against the code of an earlier commit, in turns, and how peak memory grows with cells.

Simulated counts (18,080 genes, 3,000 controls, 20 targets), `state_sm` on all genes in and out, trained for 3 steps;
and the same network with the wider head that arc-state's networks of all genes have, with drawn weights. Each run is a
process of its own.

    python -m benchmarks.generate --shared ../shared/data --out out/generate
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.host import ROOT, old_source
from benchmarks.packing import Measured, in_turns, measure, where_and_when

OLD = "93cf750"
"""The last commit that encoded control cells again for each target."""
CELLS = (20_000, 40_000)
CASES = {"own head, donors": ("run", "donors"), "wide head, sparse": ("wide-run", "sparse")}
_TOML = """
[datasets]
simulated = "counts.h5ad"
[training]
simulated = "train"
[columns]
batch = "batch"
context = "H1"
[train]
steps = 3
val_every = 1000000
precision = "fp32"
[submission]
genes = "{genes}"
"""


def set_up(out: Path, shared: Path) -> None:
    """Simulate cells, prepare a store, train, and write the run with the wide head; in a process of its own."""
    import torch
    from benchmarks.simulate import simulate

    from pertcast.config import load_experiment
    from pertcast.data.prepare import prepare
    from pertcast.models.run_folder import open_run, save_run
    from pertcast.models.state import StateTransition
    from pertcast.train import train

    genes = shared / "vcc2025" / "gene_names.csv"
    names = genes.read_text().split()
    targets = names[:: len(names) // 20][:20]
    for cells in CELLS:
        lines = "".join(f"{target},{cells // len(targets)}\n" for target in targets)
        (out / f"targets-{cells}.csv").write_text(f"target_gene,n_cells\n{lines}")
    simulate(out / "counts.h5ad", genes=names, targets=targets, cells_per_target=64, num_controls=3_000)
    (out / "experiment.toml").write_text(_TOML.format(genes=genes))
    experiment = load_experiment(out / "experiment.toml")
    train(experiment, prepare(experiment, out / "store"), out / "run")
    run = open_run(out / "run")
    spec = replace(run.network, bottleneck=True)
    shutil.copytree(out / "run" / "features", out / "wide-run" / "features", dirs_exist_ok=True)
    wide = StateTransition(spec, generator=torch.Generator().manual_seed(0))
    save_run(replace(run, path=out / "wide-run", spec=spec), wide.state_dict(), inputs={})


def command(source: Path, out: Path, cells: int, case: str) -> list[str]:
    """Return the command that generates so many cells with the code in `source`."""
    run, way = CASES[case]
    rules = ("submission.rules.num_targets=20", "submission.rules.max_cells=200000", "submission.num_controls=1")
    sets = [part for rule in (*rules, f"generate.cells={way}") for part in ("--set", rule)]
    made = [str(out / run), "--targets", str(out / f"targets-{cells}.csv"), "--out", str(out / "parts"), *sets]
    return ["env", f"PYTHONPATH={source / 'src'}", sys.executable, "-m", "pertcast", "generate", *made]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table of medians, ratios and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="the folder of the challenge's small files")
    parser.add_argument("--out", type=Path, required=True, help="folder for data, store and runs")
    parser.add_argument("--old", default=OLD, help="commit to compare with (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side, in turns (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--set-up-only", action="store_true")
    given = parser.parse_args(arguments)
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if given.set_up_only:
        set_up(out, given.shared.resolve())
        return
    sources = {given.old: old_source(given.old, out / "old"), "this": ROOT}
    if not (out / "wide-run" / "manifest.json").exists():
        # the earlier code writes the runs, which this one reads, too
        once = [sys.executable, "-m", "benchmarks.generate", "--shared", str(given.shared), "--out", str(out)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(out / "old" / "src"), str(ROOT)])}
        subprocess.run([*once, "--set-up-only"], check=True, env=environment)

    def clean() -> None:
        shutil.rmtree(out / "parts", ignore_errors=True)

    def well(run: Measured) -> Measured:
        if run.code:
            raise SystemExit("pertcast generate failed; run the command by hand")
        return run

    print(where_and_when())
    few, many = CELLS
    for case in given.cases:
        commands = {side: command(source, out, few, case) for side, source in sources.items()}
        found = in_turns(commands, rounds=given.rounds, clean=clean)
        seconds = {side: statistics.median(well(run).seconds for run in runs) for side, runs in found.items()}
        peak = {side: max(run.peak_bytes for run in runs) / 1e9 for side, runs in found.items()}
        clean()
        more = well(measure(command(ROOT, out, many, case)))
        clean()
        print(
            f"{case}: {few:,} cells in {seconds[given.old]:.1f} s before, {seconds['this']:.1f} s now "
            f"(ratio {seconds['this'] / seconds[given.old]:.2f}); {many:,} cells in {more.seconds:.1f} s. Peak memory "
            f"{peak[given.old]:.2f} GB before, {peak['this']:.2f} GB now; {more.peak_bytes / 1e9:.2f} GB for {many:,}.",
            flush=True,
        )


if __name__ == "__main__":
    main()
