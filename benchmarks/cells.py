"""How cells are made decides what is called differentially expressed: every way to make them, beside real cells.

Three tables, each over several seeds:

null       counts made with no effect of one half of real controls (their mean, from a sample of them) against the other
           half: DE calls, variance, zeros, depth, beside real cells of the first half. H1 and simulated 18,080 genes.
k562       the true mean effect of one half of each target's cells on control cells, against the other half: DES and
           DE calls.
simulated  the same with the true mean of many cells, against real cells of the same number.

    python -m benchmarks.cells --tables null k562 simulated --seeds 3
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
from benchmarks.predictions import find_shared
from benchmarks.screen import ScreenConfig, draw_cells, draw_screen, made_up_features
from numpy.typing import NDArray
from scipy import sparse

from pertcast.files.expression import normalise_log1p
from pertcast.generate.cells import (
    Donors,
    dense_to_csr,
    draw_counts,
    reweight,
    round_to_counts,
    shift,
    shift_sparing_zeros,
)
from pertcast.seasons import CONTROL_LABEL, PERT_COLUMN
from pertcast.stats.counts import fit_counts
from pertcast.stats.de import differential_expression
from pertcast.stats.draws import generator
from pertcast.stats.groups import group_cells
from pertcast.stats.metrics import de_overlap, effect_correlation, is_significant, mean_absolute_error
from pertcast.stats.realism import Likeness, Reference, compare_cells
from pertcast.stats.uniforms import uniform_key

__all__ = ["MAKERS", "Controls", "make_cells"]

MAKERS = ("donors", "negative_binomial", "nb_head", "sparse", "shift", "shift counts", "shift mean only")
Csr = sparse.csr_matrix
# a fold of a gene that hardly anyone shows is not told from none
_HALF_SEEN = 1e-3


class Controls(NamedTuple):
    """Control cells of one context: counts, and what they are normalised to."""

    counts: Csr
    target_sum: float

    @property
    def log1p(self) -> Csr:
        """Normalised values."""
        return to_log1p(self.counts, self.target_sum)


def totals_of(counts: Csr) -> NDArray[np.float64]:
    """Return the counts of each cell."""
    return np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()


def to_log1p(counts: Csr, target_sum: float) -> Csr:
    """Return normalised values."""
    return normalise_log1p(counts, totals_of(counts), target_sum)


def mean_of(log1p: Csr) -> NDArray[np.float64]:
    """Return the pseudobulk."""
    return np.asarray(log1p.mean(axis=0, dtype=np.float64)).ravel()


def make_cells(
    controls: Controls, mean: NDArray[np.float64], how: str, *, number: int, seed: int, umi: float | None = None
) -> Csr:
    """Return log1p cells (number, G) that carry a mean, made of a sample of control cells.

    For "nb_head" the mean is turned into folds of a counts head: rates are as many times those of control cells as
    expm1 of the mean is, at the control cells' dispersion. Of shallow cells that is a rough stand-in.
    """
    random = generator(seed, "donors")
    laps = [random.permutation(controls.counts.shape[0]) for _ in range(-(-number // controls.counts.shape[0]))]
    rows = np.concatenate(laps)[:number]
    donors, key = controls.counts[rows], uniform_key(seed, "cells", how)
    if how in ("donors", "negative_binomial"):
        fit = fit_counts([(controls.counts, np.zeros(controls.counts.shape[0], dtype=np.int64))], num_batches=1)
        given = Donors(donors, np.zeros(number, dtype=np.int64), controls.target_sum)
        made = reweight(given, mean, fit, key=key, median_umi=umi, from_fit=how == "negative_binomial")
        return to_log1p(made, controls.target_sum)
    if how == "nb_head":
        fit = fit_counts([(controls.counts, np.zeros(controls.counts.shape[0], dtype=np.int64))], num_batches=1)
        sizes = totals_of(donors) * (1.0 if umi is None else umi / float(np.median(totals_of(donors))))
        fold = np.log((np.expm1(mean) + _HALF_SEEN) / (np.expm1(mean_of(controls.log1p)) + _HALF_SEEN))
        batch = np.zeros(number, dtype=np.int64)
        return to_log1p(draw_counts(fit.share, fold, fit.shape, batch=batch, sizes=sizes, key=key), controls.target_sum)
    log1p = to_log1p(donors, controls.target_sum).toarray()
    if how == "sparse":
        return dense_to_csr(shift_sparing_zeros(log1p, mean))
    spread = 0.0 if how == "shift mean only" else 1.0
    moved = dense_to_csr(shift(log1p, mean, spread=spread))
    if how == "shift counts":
        return to_log1p(round_to_counts(moved, totals_of(donors), key=key), controls.target_sum)
    return moved


def halves(number: int, seed: int, *key: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return two random halves of numbers, of one size."""
    order = generator(seed, "halves", *key).permutation(number)
    return order[: number // 2], order[number // 2 : 2 * (number // 2)]


def null_table(counts: Csr, name: str, seeds: int, *, sample: float) -> None:
    """Print the null test; `sample` is the share of the first half that cells are made of."""
    found: dict[str, list[tuple[Likeness, float]]] = {}
    for seed in range(seeds):
        ours, theirs = (counts[np.sort(half)] for half in halves(counts.shape[0], seed, name))
        target_sum = float(np.median(totals_of(ours)))
        reference = Reference(to_log1p(theirs, target_sum))
        controls = Controls(ours, target_sum)
        number = int(sample * ours.shape[0])
        real = ours[generator(seed, "donors").permutation(ours.shape[0])[:number]]
        found.setdefault("real cells", []).append((compare_cells(to_log1p(real, target_sum), reference), 0.0))
        mean = mean_of(controls.log1p)
        for how in MAKERS:
            start = time.perf_counter()
            made = make_cells(controls, mean, how, number=number, seed=seed, umi=target_sum)
            found.setdefault(how, []).append((compare_cells(made, reference), time.perf_counter() - start))
    print(f"\nNull, {name}: {counts.shape[0]:,} controls in halves, {counts.shape[1]:,} genes, {seeds} seeds\n")
    print("| cells | DE calls | variance ratio .1 / .5 / .9 | zeros, points: median, .05, .95 | gene-gene r |")
    print("|---|---|---|---|---|")
    for how, rows in found.items():
        calls = ", ".join(str(like.de_calls) for like, _ in rows)
        ratio = " / ".join(f"{value:.2f}" for value in np.mean([like.variance_ratio for like, _ in rows], axis=0))
        few, middle, many, _ = 100 * np.mean([like.zero_difference for like, _ in rows], axis=0)
        pairs = np.mean([like.correlation for like, _ in rows])
        print(f"| {how} | {calls} | {ratio} | {middle:+.1f}, {few:+.1f}, {many:+.1f} | {pairs:.2f} |")


class Effects(NamedTuple):
    """DE calls, DES, MAE of the pseudobulk and effect correlation, means over targets."""

    calls: float
    des: float
    mae: float
    correlation: float


def score_effects(made: list[Csr], real: list[Csr], control: Csr) -> Effects:
    """Compare cells of several targets with real ones; the same real controls on both sides."""
    theirs = group_cells(control.astype(np.float32), np.zeros(control.shape[0], dtype=np.int64))

    def called(cells: list[Csr]) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
        codes = np.repeat(np.arange(len(cells)), [part.shape[0] for part in cells])
        groups = group_cells(sparse.vstack(cells, format="csr").astype(np.float32), codes)
        table = differential_expression(groups, theirs)
        return is_significant(table.fdr), table.log2_fold_change, np.stack([mean_of(part) for part in cells])

    real_called, _, real_means = called(real)
    made_called, folds, means = called(made)
    overlap = de_overlap(real_called, made_called, folds)
    base = mean_of(control)
    return Effects(
        float(overlap.num_predicted.mean()),
        float(overlap.score.mean()),
        float(mean_absolute_error(real_means, means).mean()),
        float(np.nanmean(effect_correlation(real_means - base, means - base))),
    )


def effect_table(name: str, seeds: int, run: Callable[[int], Iterator[tuple[str, Effects]]]) -> None:
    """Print what each way of making cells gives, mean and standard error over seeds."""
    found: dict[str, list[Effects]] = {}
    for seed in range(seeds):
        for how, effects in run(seed):
            found.setdefault(how, []).append(effects)
    print(f"\nTrue mean effect, {name}, {seeds} seeds (± standard error over seeds)\n")
    print("| cells | DE calls | DES | MAE of the pseudobulk | effect correlation |")
    print("|---|---|---|---|---|")
    for how, rows in found.items():
        middle, error = np.mean(rows, axis=0), np.std(rows, axis=0) / np.sqrt(max(len(rows) - 1, 1))
        print(
            f"| {how} | {middle[0]:.2f} | {middle[1]:.3f} ± {error[1]:.3f} "
            f"| {middle[2]:.4f} | {middle[3]:.2f} ± {error[3]:.2f} |"
        )


def k562_effects(seed: int) -> Iterator[tuple[str, Effects]]:
    """Yield the scores of one random halving of the real K562 cells."""
    cells = ad.read_h5ad(find_shared() / "four_contexts.h5ad")
    cells = cells[cells.obs["cell_type"].astype(str).str.lower() == "k562"]
    labels = cells.obs["perturbation"].astype(str).to_numpy()
    counts = sparse.csr_matrix(cells.X)
    controls = Controls(counts[labels == "control"], float(np.median(totals_of(counts))))
    one, other = [], []
    for target in sorted(set(labels) - {"control"}):
        rows = np.flatnonzero(labels == target)
        mine, theirs = halves(len(rows), seed, target)
        one.append(to_log1p(counts[rows[mine]], controls.target_sum))
        other.append(to_log1p(counts[rows[theirs]], controls.target_sum))
    yield "real cells, the other half", score_effects(one, other, controls.log1p)
    for how in MAKERS:
        made = [
            make_cells(controls, mean_of(part), how, number=part.shape[0], seed=1000 * seed + place)
            for place, part in enumerate(one)
        ]
        yield how, score_effects(made, other, controls.log1p)


def simulated_effects(seed: int) -> Iterator[tuple[str, Effects]]:
    """Yield the scores with simulated truth: the mean is that of 2,000 cells, the real cells are 200 others."""
    number, known = 200, 2000
    config = ScreenConfig(
        num_targets=12,
        num_genes=3000,
        cells_per_target=known + 2 * number,
        num_controls=1500,
        num_batches=1,
        umi=9000.0,
        strength=0.15,
        tail=0.6,
        seed=seed,
    )
    genes = (find_shared() / "vcc2025" / "gene_names.csv").read_text().split()
    screen = draw_screen(genes, made_up_features(genes), config)
    cells = draw_cells(screen, config)
    labels, counts = cells.obs[PERT_COLUMN].astype(str).to_numpy(), sparse.csr_matrix(cells.X)
    control_counts = counts[labels == CONTROL_LABEL]
    controls = Controls(control_counts, float(np.median(totals_of(control_counts))))
    of_target = [to_log1p(counts[labels == target], controls.target_sum) for target in screen.targets]
    real = [part[:number] for part in of_target]
    yield "real cells", score_effects([part[number : 2 * number] for part in of_target], real, controls.log1p)
    for how in MAKERS:
        made = [
            make_cells(controls, mean_of(part[2 * number :]), how, number=number, seed=1000 * seed + place)
            for place, part in enumerate(of_target)
        ]
        yield how, score_effects(made, real, controls.log1p)


def simulated_controls(seed: int, *, number: int, umi: float) -> Csr:
    """Return simulated control cells of the season's 18,080 genes."""
    genes = (find_shared() / "vcc2025" / "gene_names.csv").read_text().split()
    config = ScreenConfig(
        num_targets=1, num_genes=len(genes), cells_per_target=1, num_controls=number, umi=umi, seed=seed
    )
    screen = draw_screen(genes, made_up_features(genes), config)
    cells = draw_cells(screen, config)
    counts: Csr = sparse.csr_matrix(cells.X)[(cells.obs[PERT_COLUMN] == CONTROL_LABEL).to_numpy()]
    return counts


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", nargs="+", default=["null", "k562", "simulated"])
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    if "null" in given.tables:
        h1: Path = find_shared() / "H1-VCC-2025-training.h5ad"
        cells = ad.read_h5ad(h1)
        null_table(
            sparse.csr_matrix(cells.X)[(cells.obs[PERT_COLUMN] == CONTROL_LABEL).to_numpy()],
            "H1",
            given.seeds,
            sample=1,
        )
        null_table(sparse.csr_matrix(cells.X), "H1, all 600 cells as if controls", given.seeds, sample=0.7)
        null_table(simulated_controls(0, number=1200, umi=20_000), "simulated", given.seeds, sample=0.7)
    if "k562" in given.tables:
        effect_table("K562", given.seeds, k562_effects)
    if "simulated" in given.tables:
        effect_table("simulated", given.seeds, simulated_effects)


if __name__ == "__main__":
    _main()
