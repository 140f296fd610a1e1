"""Differential expression: the rank-sum statistics that the official scorers compute with pdex.

Legend of shapes: P groups (perturbations), G genes. Values are not negative, and all zeros of a gene are one block of
ties. Every function is deterministic for any number of threads.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pertcast.stats.groups import CellGroups, compiled, group_means, parallel_over_genes

FDR = 0.05

_DIGIT_BITS = 11
_DIGIT_MASK = (1 << _DIGIT_BITS) - 1


class DeTable(NamedTuple):
    """Statistics of every group against the control, each (P, G) float64."""

    p_value: NDArray[np.float64]  # Two-sided, with tie and continuity correction
    fdr: NDArray[np.float64]  # `p_value`, adjusted within a group
    log2_fold_change: NDArray[np.float64]  # Of geometric means; infinite if one of the two is 0, 0 if both are


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
def _sort(bits: Any, tags: Any, length: int, spare_bits: Any, spare_tags: Any, counts: Any) -> bool:
    """Sort by bits, stably (radix sort); return whether the result is in the spare arrays."""
    in_spare = False
    for digit in range(counts.shape[0]):
        counts[digit, :] = 0
    for entry in range(length):
        for digit in range(counts.shape[0]):
            counts[digit, (bits[entry] >> (digit * _DIGIT_BITS)) & _DIGIT_MASK] += 1
    for digit in range(counts.shape[0]):
        shift = digit * _DIGIT_BITS
        if counts[digit, (bits[0] >> shift) & _DIGIT_MASK] == length:
            continue
        before = 0
        for value in range(counts.shape[1]):
            number = counts[digit, value]
            counts[digit, value] = before
            before += number
        for entry in range(length):
            value = (bits[entry] >> shift) & _DIGIT_MASK
            place = counts[digit, value]
            counts[digit, value] += 1
            spare_bits[place] = bits[entry]
            spare_tags[place] = tags[entry]
        bits, spare_bits = spare_bits, bits
        tags, spare_tags = spare_tags, tags
        in_spare = not in_spare
    return in_spare


@compiled
def _tally(bits: Any, tags: Any, length: int, zeros_control: float, above: Any, ties: Any) -> None:
    """Add up the pairs that each group wins and its ties with the control, over sorted nonzero values."""
    below, ties_control = zeros_control, 0.0
    start = 0
    while start < length:
        stop = start
        while stop < length and bits[stop] == bits[start] and tags[stop] < 0:
            stop += 1
        equal = float(stop - start)
        alone = equal * equal * equal - equal
        ties_control += alone
        entry = stop
        while entry < length and bits[entry] == bits[start]:
            group, first = tags[entry], entry
            while entry < length and bits[entry] == bits[start] and tags[entry] == group:
                entry += 1
            ours = float(entry - first)
            both = ours + equal
            above[group] += ours * (below + 0.5 * equal)
            ties[group] += both * both * both - both - alone
        below += equal
        start = entry
    ties += ties_control


@compiled
def _rank_sum(
    bits: Any,
    starts: Any,
    sizes: Any,
    control_bits: Any,
    control_starts: Any,
    num_control: int,
    first_gene: int,
    last_gene: int,
    p_value: Any,
    statistic: Any,
) -> None:
    num_groups = starts.shape[0]
    most = 1
    for gene in range(first_gene, last_gene):
        number = control_starts[gene + 1] - control_starts[gene]
        for group in range(num_groups):
            number += starts[group, gene + 1] - starts[group, gene]
        most = max(most, number)
    pool, spare = np.empty(most, dtype=bits.dtype), np.empty(most, dtype=bits.dtype)
    tags, spare_tags = np.empty(most, dtype=np.int32), np.empty(most, dtype=np.int32)
    num_digits = (8 * bits.itemsize + _DIGIT_BITS - 1) // _DIGIT_BITS
    counts = np.empty((num_digits, _DIGIT_MASK + 1), dtype=np.int32)
    above, ties = np.empty(num_groups), np.empty(num_groups)
    for gene in range(first_gene, last_gene):
        length = 0
        for entry in range(control_starts[gene], control_starts[gene + 1]):
            pool[length], tags[length] = control_bits[entry], -1
            length += 1
        zeros_control = float(num_control - length)
        for group in range(num_groups):
            first, last = starts[group, gene], starts[group, gene + 1]
            zeros = float(sizes[group] - (last - first))
            block = zeros + zeros_control
            above[group], ties[group] = 0.5 * zeros * zeros_control, block * block * block - block
            for entry in range(first, last):
                pool[length], tags[length] = bits[entry], group
                length += 1
        if length > 0 and _sort(pool, tags, length, spare, spare_tags, counts):
            _tally(spare, spare_tags, length, zeros_control, above, ties)
        else:
            _tally(pool, tags, length, zeros_control, above, ties)
        for group in range(num_groups):
            statistic[group, gene] = above[group]
            p_value[group, gene] = _two_sided(above[group], float(sizes[group]), float(num_control), ties[group])


def rank_sum(
    groups: CellGroups, control: CellGroups, *, threads: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compare every group with the control by the Wilcoxon rank-sum (Mann-Whitney) test, gene by gene.

    >>> from pertcast.stats.groups import group_cells
    >>> cells = np.array([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    >>> groups = group_cells(cells, np.array([1, 1, 1, 0, 0, 0]))
    >>> p_value, statistic = rank_sum(groups.select([1]), groups.select([0]))
    >>> round(float(p_value[0, 0]), 6), float(statistic[0, 0])
    (0.080856, 0.0)
    """
    num_groups, num_genes = groups.starts.shape[0], groups.starts.shape[1] - 1
    p_value, statistic = np.empty((num_groups, num_genes)), np.empty((num_groups, num_genes))
    if groups.values.dtype != control.values.dtype or groups.values.dtype.itemsize not in (4, 8):
        raise ValueError(
            f"expected float32 or float64 on both sides, got {groups.values.dtype}, {control.values.dtype}"
        )
    as_int = np.dtype(f"i{groups.values.dtype.itemsize}")  # floats that are not negative order as their bits do
    ours = groups.values.view(as_int), groups.starts, groups.sizes
    theirs = control.values.view(as_int), control.starts[0], int(control.sizes[0])
    parallel_over_genes(
        lambda first, last: _rank_sum(*ours, *theirs, first, last, p_value, statistic), num_genes, threads, 8
    )
    return p_value, statistic


def adjust_fdr(p_value: NDArray[np.float64]) -> NDArray[np.float64]:
    """Adjust the p-values of each row by Benjamini and Hochberg, (P, G).

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

    >>> log2_fold_changes(np.log1p([[4.0, 0.0, 1.0]]), np.log1p([1.0, 0.0, 0.0])).round(9).tolist()
    [[2.0, 0.0, inf]]
    """
    out = np.empty(means_log1p.shape)
    _log2_ratio(means_log1p, control_mean_log1p, out)
    return out


def differential_expression(
    groups: CellGroups, control: CellGroups, *, from_dense: bool = False, threads: int = 1
) -> DeTable:
    """Return pdex's statistics of each group against the control (mode ``ref``, log1p values, epsilon 0)."""
    p_value, _ = rank_sum(groups, control, threads=threads)
    _, means = group_means(groups, from_dense=from_dense)
    _, control_mean = group_means(control, from_dense=from_dense)
    return DeTable(p_value, adjust_fdr(p_value), log2_fold_changes(means, control_mean[0]))
