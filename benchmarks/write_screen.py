"""Writes a simulated screen, its features, its truth and an experiment with held-out targets into a folder.

python -m benchmarks.write_screen --genes gene_names.csv --features go_bp_svd256.npz --out screen
pertcast compare screen/experiment.toml --out comparison
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from benchmarks.screen import BATCH_COLUMN, CONTEXT_COLUMN, Screen, ScreenConfig, draw_cells, draw_screen

from pertcast.data.features import read_vectors
from pertcast.seasons import CONTROL_LABEL, PERT_COLUMN
from pertcast.stats.draws import generator

__all__ = ["write_screen"]

_EXPERIMENT = """# A simulated screen: {num_targets} targets, {num_genes} genes, contexts {contexts}; seed {seed}.

[datasets]
screen = "screen.h5ad"

[training]
screen = "train"
{fewshot}
[columns]
pert = "{pert}"
control = "{control}"
cell_type = "{context_column}"
batch = "{batch}"

[features]
kind = "file"
path = "features.npz"

[submission]
genes = "gene_names.csv"

[submission.rules]
num_genes = {num_genes}
"""


def write_screen(
    folder: Path,
    screen: Screen,
    config: ScreenConfig,
    *,
    num_val: int = 0,
    num_test: int = 0,
    held_out_in: Sequence[str] | None = None,
) -> Path:
    """Write ``screen.h5ad``, ``features.npz``, ``gene_names.csv``, ``truth.npz`` and ``experiment.toml`` into a folder.

    Parameters
    ----------
    folder, screen, config
        Where, and what.
    num_val, num_test
        Targets that validate and test, drawn among all, the same ones in all contexts of `held_out_in`.
    held_out_in
        Contexts in which they are held out; default: all, so that they are seen nowhere.

    Returns
    -------
    Path of the experiment file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw_cells(screen, config).write_h5ad(folder / "screen.h5ad")
    names = list(screen.features)
    matrix = np.stack([screen.features[name] for name in names])
    np.savez(folder / "features.npz", gene=np.array(names), embedding=matrix)
    np.savez(
        folder / "truth.npz",
        genes=np.array(screen.genes),
        targets=np.array(screen.targets),
        contexts=np.array(config.contexts),
        effects=screen.effects_CPG.astype(np.float32),
    )
    (folder / "gene_names.csv").write_text("".join(f"{gene}\n" for gene in screen.genes))
    drawn = generator(config.seed, "screen", "held out").permutation(len(screen.targets))[: num_val + num_test]
    held = [screen.targets[place] for place in drawn]
    fewshot = "".join(
        f'\n[fewshot."screen.{context}"]\nval = {sorted(held[:num_val])}\ntest = {sorted(held[num_val:])}\n'
        for context in (held_out_in or config.contexts)
        if held
    )
    path = folder / "experiment.toml"
    path.write_text(
        _EXPERIMENT.format(
            num_targets=len(screen.targets),
            num_genes=len(screen.genes),
            contexts=", ".join(config.contexts),
            seed=config.seed,
            fewshot=fewshot.replace("'", '"'),
            pert=PERT_COLUMN,
            control=CONTROL_LABEL,
            context_column=CONTEXT_COLUMN,
            batch=BATCH_COLUMN,
        )
    )
    return path


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--genes", type=Path, required=True, help="one gene a line, without a header")
    parser.add_argument("--features", type=Path, required=True, help=".npz or .pt of features by gene")
    parser.add_argument("--contexts", nargs="+", default=["sim"])
    parser.add_argument("--targets", type=int, default=120)
    parser.add_argument("--num-genes", type=int, default=2000)
    parser.add_argument("--cells-per-target", type=int, default=100)
    parser.add_argument("--controls", type=int, default=1000)
    parser.add_argument("--val", type=int, default=12, help="targets that validate")
    parser.add_argument("--test", type=int, default=36, help="targets that test")
    parser.add_argument("--held-out-in", nargs="+", help="contexts in which they are held out; default: all")
    parser.add_argument("--noise", choices=["nb", "poisson", "none"], default="nb")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    start = time.perf_counter()
    config = ScreenConfig(
        contexts=tuple(given.contexts),
        num_targets=given.targets,
        num_genes=given.num_genes,
        cells_per_target=given.cells_per_target,
        num_controls=given.controls,
        noise=given.noise,
        seed=given.seed,
    )
    screen = draw_screen(given.genes.read_text().split(), read_vectors(given.features), config)
    path = write_screen(
        given.out, screen, config, num_val=given.val, num_test=given.test, held_out_in=given.held_out_in
    )
    print(f"{path}: {given.targets} targets in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    _main()
