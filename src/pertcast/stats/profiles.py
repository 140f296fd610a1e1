"""What the official metrics need to know of groups of cells in memory, and the metrics of one side against another.

Legend of shapes: P perturbations, G genes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.stats.de import differential_expression
from pertcast.stats.groups import group_cells, group_means
from pertcast.stats.metrics import de_overlap, discrimination, is_significant, mean_absolute_error

__all__ = ["Profile", "constant_profile", "profile_of", "score_profiles"]


class Profile(NamedTuple):
    """Perturbations beside one set of control cells, (P, G) each.

    Attributes
    ----------
    means, effects
        Mean log1p, and that minus the control's.
    significant, log2_fold_change
        Which genes are differentially expressed, by the official statistics, and by how much.
    """

    means: NDArray[np.float64]
    effects: NDArray[np.float64]
    significant: NDArray[np.bool_]
    log2_fold_change: NDArray[np.float64]


def profile_of(
    cells_log1p: sparse.csr_matrix | NDArray[np.floating],
    codes: NDArray[np.int64],
    controls_log1p: sparse.csr_matrix,
    *,
    threads: int = 1,
) -> Profile:
    """Return the profile of cells.

    Parameters
    ----------
    cells_log1p
        (cells, G), of the same number type as the controls.
    codes
        (cells,) the perturbation of each, from 0.
    controls_log1p
        (controls, G).
    threads
        How many ranges of genes to work on at a time.
    """
    ours = group_cells(cells_log1p, codes)
    theirs = group_cells(controls_log1p, np.zeros(controls_log1p.shape[0], dtype=np.int64))
    table = differential_expression(ours, theirs, threads=threads)
    means, control_mean = group_means(ours)[0], group_means(theirs)[0]
    return Profile(means, means - control_mean, is_significant(table.fdr), table.log2_fold_change)


def constant_profile(
    cell_log1p: NDArray[np.floating], sizes: NDArray[np.int64], controls_log1p: sparse.csr_matrix, *, threads: int = 1
) -> Profile:
    """Return the profile of perturbations whose cells are all one and the same; they have `sizes` (P,) cells."""
    distinct, place = np.unique(sizes, return_inverse=True)
    codes = np.repeat(np.arange(len(distinct)), distinct)
    copies = np.broadcast_to(cell_log1p.astype(controls_log1p.dtype), (len(codes), len(cell_log1p)))
    found = profile_of(copies, codes, controls_log1p, threads=threads)
    return Profile(found.means[place], found.effects[place], found.significant[place], found.log2_fold_change[place])


def score_profiles(predicted: Profile, real: Profile, own_gene: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Return the metrics of each perturbation, (P,): ``mae``, ``pds``, ``des``.

    Parameters
    ----------
    predicted, real
        Of the same perturbations and genes.
    own_gene
        (P,) position of each perturbation's own gene, -1 where it is none of the genes.
    """
    return {
        "mae": mean_absolute_error(real.means, predicted.means),
        "pds": discrimination(real.effects, predicted.effects, own_gene),
        "des": de_overlap(real.significant, predicted.significant, predicted.log2_fold_change).score,
    }
