"""Writes simulated training counts of realistic shape (genes, UMIs, zeros of a real screen) in bounded memory.

Counts are negative binomial around a cell's mean: gene means (log-normal, so that at 54,000 UMI a cell about 7,000 of
18,080 genes are seen), times the cell's size, the batch's factor for each gene, and the target's effect. An effect is
the loss of the target's own gene and a low-rank change of the others: programs of genes, mixed by the target.

Every draw is keyed by the seed and by what it is for; the same call writes the same bytes.

    python benchmarks/simulate.py --genes gene_names.csv --targets targets.txt --out simulated.h5ad
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse, stats

from pertcast.files.artefacts import atomic_file
from pertcast.files.h5ad_writer import CsrWriter
from pertcast.seasons import CONTROL_LABEL, PERT_COLUMN
from pertcast.stats.draws import generator

__all__ = ["Truth", "draw_truth", "simulate"]

BATCH_COLUMN = "batch"
_BLOCK_CELLS = 256
_GENE_SPREAD = 2.1
_SIZE_SPREAD = 0.3
_BATCH_SPREAD = 0.1
_DISPERSION = 0.12
_PROGRAMS = 8
_GENES_IN_PROGRAM = 0.05
_EFFECT_SPREAD = 0.4
_OWN_GENE_LEFT = 0.15


@dataclass(frozen=True)
class Truth:
    """What cells are drawn around.

    Attributes
    ----------
    share
        (G,) share of each gene in the UMIs of a control cell.
    batch_factors
        (batches, G) factor of each batch.
    effects
        (targets, G) factor of each target; the last row is the control's, all ones.
    """

    share: NDArray[np.float64]
    batch_factors: NDArray[np.float64]
    effects: NDArray[np.float64]


def draw_truth(genes: Sequence[str], targets: Sequence[str], *, num_batches: int, seed: int) -> Truth:
    """Draw what is common to all cells; a target's effect does not depend on the other targets."""
    num_genes = len(genes)
    quantiles = stats.norm.ppf((np.arange(num_genes) + 0.5) / num_genes)
    means = np.exp(_GENE_SPREAD * generator(seed, "simulate", "gene means").permutation(quantiles))
    batches = [generator(seed, "simulate", "batch", batch).normal(size=num_genes) for batch in range(num_batches)]
    random = generator(seed, "simulate", "programs")
    members = random.random((_PROGRAMS, num_genes)) < _GENES_IN_PROGRAM
    programs = members * random.normal(size=members.shape)
    position = {gene: place for place, gene in enumerate(genes)}
    effects = np.ones((len(targets) + 1, num_genes))
    for row, target in enumerate(targets):
        mix = generator(seed, "simulate", "effect", target).normal(size=_PROGRAMS) * _EFFECT_SPREAD
        effects[row] = np.exp(np.clip(mix @ programs, -2, 2))
        if target in position:
            effects[row, position[target]] = _OWN_GENE_LEFT
    return Truth(means / means.sum(), np.exp(_BATCH_SPREAD * np.stack(batches)), effects)


def simulate(
    path: Path,
    *,
    genes: Sequence[str],
    targets: Sequence[str],
    cells_per_target: int,
    num_controls: int,
    num_batches: int = 48,
    umi: float = 54_000,
    seed: int = 0,
) -> Path:
    """Write whole counts (float32, as the official file has them) with obs `target_gene` and `batch`.

    Parameters
    ----------
    path
        The h5ad to write.
    genes, targets
        Columns, and perturbed genes (labels that are no gene have no own gene to lose).
    cells_per_target, num_controls
        Cells of each target, and of the control; they lie in random order.
    num_batches
        Batches; every label has cells of each.
    umi
        Mean UMIs of a control cell.
    seed
        Key of every draw.
    """
    truth = draw_truth(genes, targets, num_batches=num_batches, seed=seed)
    labels = np.repeat(np.arange(len(targets) + 1), [*[cells_per_target] * len(targets), num_controls])
    batches = np.arange(len(labels)) % num_batches
    order = generator(seed, "simulate", "order").permutation(len(labels))
    labels, batches = labels[order], batches[order]
    with atomic_file(path) as temporary, CsrWriter(temporary, list(genes)) as writer:
        for start in range(0, len(labels), _BLOCK_CELLS):
            block = slice(start, start + _BLOCK_CELLS)
            writer.append(_draw_cells(truth, labels[block], batches[block], umi=umi, seed=seed, first=start))
        names = [*targets, CONTROL_LABEL]
        batch_names = [f"batch_{number:02d}" for number in range(num_batches)]
        writer.finish(
            pd.DataFrame(
                {
                    PERT_COLUMN: pd.Categorical([names[code] for code in labels], categories=names),
                    BATCH_COLUMN: pd.Categorical([batch_names[code] for code in batches], categories=batch_names),
                },
                index=[f"cell_{number}" for number in range(len(labels))],
            )
        )
    return path


def _draw_cells(
    truth: Truth, labels: NDArray[np.int64], batches: NDArray[np.int64], *, umi: float, seed: int, first: int
) -> sparse.csr_matrix:
    random = generator(seed, "simulate", "cells", first)
    sizes = umi * np.exp(random.normal(-(_SIZE_SPREAD**2) / 2, _SIZE_SPREAD, size=(len(labels), 1)))
    means = truth.effects[labels]
    means *= truth.share
    means *= truth.batch_factors[batches]
    means *= sizes
    means *= random.standard_gamma(1 / _DISPERSION, size=means.shape, dtype=np.float32)
    means *= _DISPERSION
    return sparse.csr_matrix(random.poisson(means).astype(np.float32))


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--genes", type=Path, required=True, help="one gene a line, without a header")
    parser.add_argument("--targets", type=Path, required=True, help="one target a line")
    parser.add_argument("--cells-per-target", type=int, default=200)
    parser.add_argument("--controls", type=int, default=2000)
    parser.add_argument("--batches", type=int, default=48)
    parser.add_argument("--umi", type=float, default=54_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    start = time.perf_counter()
    simulate(
        given.out,
        genes=given.genes.read_text().split(),
        targets=given.targets.read_text().split(),
        cells_per_target=given.cells_per_target,
        num_controls=given.controls,
        num_batches=given.batches,
        umi=given.umi,
        seed=given.seed,
    )
    print(f"{given.out}: {given.out.stat().st_size / 1e6:,.0f} MB in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    _main()
