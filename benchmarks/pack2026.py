"""Packs and checks a season-2026 prediction against ``vcc prep``: 18,533 genes, whole counts, a quarter of the cells.

The full size is 360,000 cells (``--cells-per-target 400``); the default, 100, needs a quarter of the disk.

    python benchmarks/pack2026.py --peer path/to/vcc --out bench
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.packing import in_turns, make_prediction, table, where_and_when

BAR_PACK, BAR_CHECK, BAR_WRITTEN = 0.60, 0.35, 1.1
BAR_BYTES, BAR_REWRITTEN_BYTES = 500_000_000, 700_000_000


def _main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", required=True, help="the program vcc")
    parser.add_argument("--out", type=Path, required=True, help="a folder for large files, removed at the end")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--cells-per-target", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    number = str(given.cells_per_target)
    num_cells = make_prediction(given.out, "vcc2026", cells_per_target=given.cells_per_target)
    prediction, genes, targets = (given.out / name for name in ("prediction.h5ad", "genes.csv", "targets.csv"))
    size = prediction.stat().st_size
    vcc = given.out / "packed.vcc"

    def clean() -> None:
        for path in given.out.glob("packed.vcc*"):
            path.unlink()

    def ours(command: str, path: Path, *more: str) -> list[str]:
        options = ["--season", "vcc2026", "--genes", str(genes), "--targets", str(targets)]
        rules = ["--rule", f"cells_per_target={number}"]
        return [sys.executable, "-m", "pertcast", command, str(path), *options, *rules, *more]

    def peer(*more: str) -> list[str]:
        options = ["-g", str(genes), "--perts", str(targets), "--cells-per-pert", number]
        return [given.peer, "prep", str(prediction), *options, "--contexts", "A,B,C", *more]

    packing = {"vcc prep": peer("-o", str(vcc)), "pertcast pack": ours("pack", prediction, "-o", str(vcc))}
    found = in_turns(packing, rounds=given.rounds, clean=clean)
    archive = vcc.stat().st_size
    checking = {"vcc prep --dry-run": peer("--dry-run"), "pertcast check": ours("check", prediction)}
    found |= in_turns(checking, rounds=given.rounds, clean=clean)
    for form in ("int32", "shuffled"):
        make_prediction(given.out, "vcc2026", form=form)
        other = given.out / f"{form}.h5ad"
        command = ours("pack", other, "-o", str(vcc))
        found |= in_turns({f"pertcast pack, {form}": command}, rounds=1, clean=clean)
        other.unlink()
    shutil.rmtree(given.out)
    medians = {name: statistics.median(run.seconds for run in runs) for name, runs in found.items()}
    peaks = {name: max(run.peak_bytes for run in runs) for name, runs in found.items()}
    pack, check = (
        medians["pertcast pack"] / medians["vcc prep"],
        medians["pertcast check"] / medians["vcc prep --dry-run"],
    )
    written = max(run.written_bytes for run in found["pertcast pack"]) / archive
    rewritten = max(peaks["pertcast pack, int32"], peaks["pertcast pack, shuffled"])
    small = max(peaks["pertcast pack"], peaks["pertcast check"])
    passed = (
        pack <= BAR_PACK
        and check <= BAR_CHECK
        and written <= BAR_WRITTEN
        and small <= BAR_BYTES
        and rewritten <= BAR_REWRITTEN_BYTES
        and all(runs[-1].code == 0 for runs in found.values())
    )
    text = f"""# Packing and checking a season-2026 prediction

{where_and_when()}.
Peer: vcc-cli 0.3.0. Simulated, {num_cells:,} cells x 18,533 genes (the season's full size is
360,000 cells), whole counts, {size / 1e9:.2f} GB (CSR); the archive has {archive / 1e9:.2f} GB. Runs in turns,
file cache warm.

{table(found)}

| bar | measured |
|---|---|
| pack, wall at most {BAR_PACK} of `vcc prep` | {pack:.2f} |
| check, wall at most {BAR_CHECK} of `vcc prep --dry-run` | {check:.2f} |
| pack and check, peak memory at most 0.5 GB | {small / 1e9:.2f} GB |
| pack, bytes written at most {BAR_WRITTEN} of the archive | {written:.3f} |
| int32 counts and shuffled genes, peak memory at most 0.7 GB | {rewritten / 1e9:.2f} GB |

{"Passed." if passed else "NOT passed."}
"""
    given.results.mkdir(exist_ok=True)
    (given.results / "pack2026.md").write_text(text)
    print(text)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(_main())
