"""How cells are made decides what is called differentially expressed: every way to make them, beside real cells.

Four tables, each over several seeds:

null       counts made with no effect of one half of real controls (their mean, from a sample of them) against the other
           half: DE calls, variance, zeros, depth, beside real cells of the first half. H1 and simulated 18,080 genes.
           Kept: at most 1.5 times the DE calls of real cells and 2 more, a median variance ratio of .9 to 1.1, a median
           gene's zeros within 2 points, the median UMI within 2 % of the asked one.
k562       the true mean effect of one half of each target's cells on control cells, against the other half: DES and
           DE calls, at the control cells' depth and at that of the target's half.
simulated  the same with the true mean of many cells, against real cells of the same number.
head       cells of a trained counts head beside others of the same run, held-out targets (benchmarks/cells_head.py).

    python -m benchmarks.cells --tables null k562 simulated head --seeds 3
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
from benchmarks.cells_head import head_table
from benchmarks.makers import MAKERS, OF_COUNTS, Controls, Csr, make_cells, make_counts, mean_of, to_log1p, totals_of
from benchmarks.predictions import find_shared
from benchmarks.screen import ScreenConfig, draw_cells, draw_screen, made_up_features
from numpy.typing import NDArray
from scipy import sparse

from pertcast.seasons import CONTROL_LABEL, PERT_COLUMN
from pertcast.stats.de import differential_expression
from pertcast.stats.draws import generator
from pertcast.stats.groups import group_cells
from pertcast.stats.metrics import de_overlap, effect_correlation, is_significant, mean_absolute_error
from pertcast.stats.realism import Likeness, Reference, compare_cells

__all__ = ["Effects", "effect_table", "null_table", "score_effects"]


def halves(number: int, seed: int, *key: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return two random halves of numbers, of one size."""
    order = generator(seed, "halves", *key).permutation(number)
    return order[: number // 2], order[number // 2 : 2 * (number // 2)]


def null_table(counts: Csr, name: str, seeds: int, *, sample: float) -> None:
    """Print the null test; `sample` is the share of the first half that cells are made of."""
    found: dict[str, list[Likeness]] = {}
    depths: dict[str, list[float]] = {}
    for seed in range(seeds):
        ours, theirs = (counts[np.sort(half)] for half in halves(counts.shape[0], seed, name))
        target_sum = float(np.median(totals_of(ours)))
        reference = Reference(to_log1p(theirs, target_sum))
        controls = Controls(ours, target_sum)
        number = int(sample * ours.shape[0])
        real = ours[generator(seed, "donors").permutation(ours.shape[0])[:number]]
        found.setdefault("real cells", []).append(compare_cells(to_log1p(real, target_sum), reference))
        mean = mean_of(controls.log1p)
        for how in MAKERS:
            if how in OF_COUNTS:
                cells = make_counts(controls, mean, how, number=number, seed=seed, umi=target_sum)
                depths.setdefault(how, []).append(100 * (float(np.median(totals_of(cells))) / target_sum - 1))
                made = to_log1p(cells, target_sum)
            else:
                made = make_cells(controls, mean, how, number=number, seed=seed)
            found.setdefault(how, []).append(compare_cells(made, reference))
    print(f"\nNull, {name}: {counts.shape[0]:,} controls in halves, {counts.shape[1]:,} genes, {seeds} seeds\n")
    print(
        "| cells | DE calls | variance ratio .1 / .5 / .9 | zeros, points: median, .05, .95 | gene r | UMI, % | kept |"
    )
    print("|---|---|---|---|---|---|---|")
    for how, rows in found.items():
        calls = ", ".join(str(like.de_calls) for like in rows)
        ratio = " / ".join(f"{value:.2f}" for value in np.mean([like.variance_ratio for like in rows], axis=0))
        few, middle, many, _ = 100 * np.mean([like.zero_difference for like in rows], axis=0)
        pairs, depth = np.mean([like.correlation for like in rows]), depths.get(how, [])
        umi = f"{max(depth, key=abs):+.1f}" if depth else ""
        kept = sum(
            like.de_calls <= 1.5 * real.de_calls + 2
            and 0.9 <= like.variance_ratio[1] <= 1.1
            and abs(like.zero_difference[1]) <= 0.02
            and (not depth or abs(depth[seed]) <= 2)
            for seed, (like, real) in enumerate(zip(rows, found["real cells"], strict=True))
        )
        zeros = f"{middle:+.1f}, {few:+.1f}, {many:+.1f}"
        print(f"| {how} | {calls} | {ratio} | {zeros} | {pairs:.2f} | {umi} | {kept} of {seeds} |")


class Effects(NamedTuple):
    """DE calls, those of the truth, DES, MAE of the pseudobulk and effect correlation, means over targets."""

    calls: float
    real_calls: float
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
        float(overlap.num_real.mean()),
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
    real = np.mean(next(iter(found.values())), axis=0)
    print(f"\nTrue mean effect, {name}, {seeds} seeds (± standard error over seeds, or over paired differences)")
    print(f"DE calls of the truth: {real[1]:.2f}\n")
    print("| cells | DE calls | DES | minus real cells | minus donors | MAE of the pseudobulk | effect correlation |")
    print("|---|---|---|---|---|---|---|")
    for how, rows in found.items():
        middle = np.mean(rows, axis=0)
        des = [[effects.des for effects in found[each]] for each in (how, next(iter(found)), "donors")]
        apart = " | ".join(f"{np.mean(less):+.3f} ± {_error(less):.3f}" for less in np.subtract(des[0], des[1:]))
        print(
            f"| {how} | {middle[0]:.2f} | {middle[2]:.3f} ± {_error(des[0]):.3f} | {apart} "
            f"| {middle[3]:.4f} | {middle[4]:.2f} ± {_error([effects.correlation for effects in rows]):.3f} |"
        )


def _error(values: Sequence[float] | NDArray[np.float64]) -> float:
    return float(np.std(values) / np.sqrt(max(len(values) - 1, 1)))


def k562_effects(seed: int) -> Iterator[tuple[str, Effects]]:
    """Yield the scores of one random halving of the real K562 cells."""
    cells = ad.read_h5ad(find_shared() / "four_contexts.h5ad")
    cells = cells[cells.obs["cell_type"].astype(str).str.lower() == "k562"]
    labels = cells.obs["perturbation"].astype(str).to_numpy()
    counts = sparse.csr_matrix(cells.X)
    controls = Controls(counts[labels == "control"], float(np.median(totals_of(counts))))
    one, other, depths = [], [], []
    for target in sorted(set(labels) - {"control"}):
        rows = np.flatnonzero(labels == target)
        mine, theirs = halves(len(rows), seed, target)
        one.append(to_log1p(counts[rows[mine]], controls.target_sum))
        depths.append(float(np.median(totals_of(counts[rows[mine]]))))
        other.append(to_log1p(counts[rows[theirs]], controls.target_sum))
    yield "real cells, the other half", score_effects(one, other, controls.log1p)
    for how, asked in [*((how, False) for how in MAKERS), ("donors", True), ("negative_binomial", True)]:
        made = [
            make_cells(controls, mean_of(part), how, number=part.shape[0], seed=1000 * seed + place, umi=umi)
            for place, (part, umi) in enumerate(zip(one, depths if asked else [None] * len(one), strict=True))
        ]
        yield f"{how}, at the target's depth" if asked else how, score_effects(made, other, controls.log1p)


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
    parser.add_argument("--set", nargs="*", default=[], help="of the networks of the table head: a.b=value")
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
    if "head" in given.tables:
        head_table(range(given.seeds), 1.0, more=given.set)
    if "simulated" in given.tables:
        effect_table("simulated", given.seeds, simulated_effects)


if __name__ == "__main__":
    _main()
