"""Packs a season-2025 prediction of full size against ``cell-eval prep``: 65,751 x 18,080, log1p, CSR and dense.

python benchmarks/pack2025.py --peer path/to/cell-eval --out bench
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.packing import in_turns, make_prediction, table, where_and_when

BAR_RATIO = 0.40
BAR_BYTES = 500_000_000


def _main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", required=True, help="the program cell-eval")
    parser.add_argument("--out", type=Path, required=True, help="a folder for large files, removed at the end")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--cells-per-target", type=int, help="for a smaller prediction")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    num_cells = make_prediction(given.out, "vcc2025", cells_per_target=given.cells_per_target)
    prediction, genes, targets = (given.out / name for name in ("prediction.h5ad", "genes.csv", "targets.csv"))
    size = prediction.stat().st_size
    vcc = given.out / "packed.vcc"

    def clean() -> None:
        for path in given.out.glob("packed.vcc*"):
            path.unlink()

    def ours(path: Path) -> list[str]:
        options = ["--genes", str(genes), "--targets", str(targets), "-o", str(vcc)]
        return [sys.executable, "-m", "pertcast", "pack", str(path), *options]

    def peer(path: Path) -> list[str]:
        return [given.peer, "prep", "-i", str(path), "-g", str(genes), "-o", str(vcc)]

    commands = {"cell-eval prep": peer(prediction), "pertcast pack": ours(prediction)}
    found = in_turns(commands, rounds=given.rounds, clean=clean)
    archive = vcc.stat().st_size
    make_prediction(given.out, "vcc2025", form="dense")
    dense = given.out / "dense.h5ad"
    dense_size = dense.stat().st_size
    prediction.unlink()
    found |= in_turns({"pertcast pack, dense": ours(dense)}, rounds=1, clean=clean)
    shutil.rmtree(given.out)
    medians = {name: statistics.median(run.seconds for run in runs) for name, runs in found.items()}
    ratio = medians["pertcast pack"] / medians["cell-eval prep"]
    peak = max(run.peak_bytes for name in ("pertcast pack", "pertcast pack, dense") for run in found[name])
    passed = ratio <= BAR_RATIO and peak <= BAR_BYTES and all(runs[-1].code == 0 for runs in found.values())
    text = f"""# Packing a season-2025 prediction

{where_and_when()}.
Peer: cell-eval 0.8.2. Simulated, {num_cells:,} cells x 18,080 genes, log1p, {size / 1e9:.2f} GB
(CSR) and {dense_size / 1e9:.2f} GB (dense); the archive has {archive / 1e9:.2f} GB. Runs in turns, file cache warm.

{table(found)}

Wall time, ratio of medians: {ratio:.2f} (bar: at most {BAR_RATIO}).
Peak memory: {peak / 1e9:.2f} GB (bar: at most 0.5 GB).

{"Passed." if passed else "NOT passed."}
"""
    given.results.mkdir(exist_ok=True)
    (given.results / "pack2025.md").write_text(text)
    print(text)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(_main())
