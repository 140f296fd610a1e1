"""Which genes are differentially expressed: the rank-sum statistics that the official scorers compute with pdex.

Legend of shapes: P groups (perturbations), G genes. Values are not negative; all zeros of a gene are one block of ties.
Every function is deterministic, whatever the number of threads.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pertcast.stats.groups import CellGroups, compiled, group_means, in_bands

__all__ = ["FDR", "DeTable", "adjust_fdr", "differential_expression", "log2_fold_changes", "rank_sum"]

FDR = 0.05


class DeTable(NamedTuple):
    """Statistics of every group against the control, each (P, G) float64.

    Attributes
    ----------
    p_value
        Two-sided, with tie and continuity correction.
    fdr
        `p_value`, adjusted within a group.
    log2_fold_change
        Of geometric means; infinite where one of the two is 0, 0 where both are.
    """

    p_value: NDArray[np.float64]
    fdr: NDArray[np.float64]
    log2_fold_change: NDArray[np.float64]


@compiled
def _log2_ratio(means: Any, control_mean: Any, out: Any) -> None:
    for group in range(means.shape[0]):
        for gene in range(means.shape[1]):
            ours, theirs = np.float64(np.expm1(means[group, gene])), np.float64(np.expm1(control_mean[gene]))
            if theirs > 0.0:
                out[group, gene] = np.log2(ours / theirs) if ours > 0.0 else -np.inf
            else:
                out[group, gene] = np.inf if ours > 0.0 else 0.0


@compiled
def _lower_bound(values: Any, low: int, high: int, wanted: float) -> int:
    while low < high:
        middle = (low + high) // 2
        if values[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def _two_sided(above: float, size: float, num_control: float, ties: float) -> float:
    num_cells = size + num_control
    pairs = size * num_control
    if pairs == 0.0:
        return 1.0
    variance = pairs / 12.0 * ((num_cells + 1.0) - ties / (num_cells * (num_cells - 1.0)))
    if variance <= 0.0:
        return 1.0
    distance = max(above, pairs - above) - pairs / 2.0 - 0.5
    return min(1.0, math.erfc(distance / math.sqrt(variance) / math.sqrt(2.0)))


@compiled
def _rank_sum(
    values: Any,
    starts: Any,
    sizes: Any,
    control_values: Any,
    control_starts: Any,
    num_control: int,
    first_gene: int,
    last_gene: int,
    p_value: Any,
    statistic: Any,
) -> None:
    most = np.int64(1)
    for gene in range(first_gene, last_gene):
        most = max(most, control_starts[gene + 1] - control_starts[gene])
        for group in range(starts.shape[0]):
            most = max(most, starts[group, gene + 1] - starts[group, gene])
    distinct = np.empty(most, dtype=control_values.dtype)
    below = np.empty(most + 1, dtype=np.int64)  # control cells with a stored value below each distinct one
    buffer = np.empty(most, dtype=values.dtype)
    for gene in range(first_gene, last_gene):
        control = np.sort(control_values[control_starts[gene] : control_starts[gene + 1]])
        num_distinct, ties_control = 0, 0.0
        below[0] = 0
        for rank in range(len(control)):
            if rank == 0 or control[rank] != control[rank - 1]:
                distinct[num_distinct] = control[rank]
                below[num_distinct] = rank
                num_distinct += 1
        below[num_distinct] = len(control)
        for number in range(num_distinct):
            tied = float(below[number + 1] - below[number])
            ties_control += tied * tied * tied - tied
        zeros_control = float(num_control - len(control))
        for group in range(starts.shape[0]):
            first, last = starts[group, gene], starts[group, gene + 1]
            length, size = last - first, sizes[group]
            ours = buffer[:length]
            for entry in range(length):
                ours[entry] = values[first + entry]
            ours.sort()
            zeros = float(size - length)
            above = 0.5 * zeros * zeros_control
            block = zeros + zeros_control
            ties = ties_control + block * block * block - block
            place, entry = 0, 0
            while entry < length:
                value = ours[entry]
                stop = entry + 1
                while stop < length and ours[stop] == value:
                    stop += 1
                mine = float(stop - entry)
                place = _lower_bound(distinct, place, num_distinct, value)
                equal = 0.0
                if place < num_distinct and distinct[place] == value:
                    equal = float(below[place + 1] - below[place])
                above += mine * (zeros_control + below[place] + 0.5 * equal)
                both = mine + equal
                ties += (both * both * both - both) - (equal * equal * equal - equal)
                entry = stop
            statistic[group, gene] = above
            p_value[group, gene] = _two_sided(above, float(size), float(num_control), ties)


def rank_sum(
    groups: CellGroups, control: CellGroups, *, threads: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compare every group with the control by the Wilcoxon rank-sum (Mann-Whitney) test, gene by gene.

    The asymptotic two-sided test with tie and continuity correction; a gene whose cells are all alike has p = 1.

    Parameters
    ----------
    groups
        P groups.
    control
        One group, of the same genes.
    threads
        How many ranges of genes to work on at a time.

    Returns
    -------
    p_value, statistic
        (P, G) each; the statistic is U of the group: pairs in which its cell is above the control's, ties as halves.

    Examples
    --------
    >>> from pertcast.stats.groups import group_cells
    >>> cells = np.array([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    >>> groups = group_cells(cells, np.array([1, 1, 1, 0, 0, 0]))
    >>> p_value, statistic = rank_sum(groups.select([1]), groups.select([0]))
    >>> round(float(p_value[0, 0]), 6), float(statistic[0, 0])
    (0.080856, 0.0)
    """
    num_groups, num_genes = groups.starts.shape[0], groups.starts.shape[1] - 1
    p_value, statistic = np.empty((num_groups, num_genes)), np.empty((num_groups, num_genes))
    ours = groups.values, groups.starts, groups.sizes
    theirs = control.values, control.starts[0], int(control.sizes[0])
    in_bands(lambda first, last: _rank_sum(*ours, *theirs, first, last, p_value, statistic), num_genes, threads, 8)
    return p_value, statistic


def adjust_fdr(p_value: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the p-values of each row, (P, G), adjusted after Benjamini and Hochberg.

    Examples
    --------
    >>> adjust_fdr(np.array([[0.01, 0.04, 0.03]])).round(6).tolist()
    [[0.03, 0.04, 0.04]]
    """
    num_genes = p_value.shape[1]
    order = np.argsort(p_value, axis=1)
    scaled = np.take_along_axis(p_value, order, axis=1) * (num_genes / np.arange(1, num_genes + 1))
    scaled = np.minimum.accumulate(scaled[:, ::-1], axis=1)[:, ::-1]
    adjusted = np.empty_like(scaled)
    np.put_along_axis(adjusted, order, np.clip(scaled, 0.0, 1.0), axis=1)
    return adjusted


def log2_fold_changes(
    means_log1p: NDArray[np.floating], control_mean_log1p: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Return log2(expm1(mean) / expm1(mean of the control)), (P, G); 0 where both are 0.

    Examples
    --------
    >>> log2_fold_changes(np.log1p([[4.0, 0.0, 1.0]]), np.log1p([1.0, 0.0, 0.0])).round(9).tolist()
    [[2.0, 0.0, inf]]
    """
    out = np.empty(means_log1p.shape)
    _log2_ratio(means_log1p, control_mean_log1p, out)
    return out


def differential_expression(
    groups: CellGroups, control: CellGroups, *, from_dense: bool = False, threads: int = 1
) -> DeTable:
    """Return what pdex says of each group against the control (mode ``ref``, log1p values, epsilon 0).

    Parameters
    ----------
    groups, control
        P groups and one, of the same genes; log1p values.
    from_dense
        See :func:`group_means`.
    threads
        How many ranges of genes to work on at a time.
    """
    p_value, _ = rank_sum(groups, control, threads=threads)
    _, means = group_means(groups, from_dense=from_dense)
    _, control_mean = group_means(control, from_dense=from_dense)
    return DeTable(p_value, adjust_fdr(p_value), log2_fold_changes(means, control_mean[0]))
