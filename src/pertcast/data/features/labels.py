"""Features of labels that name several genes, as "A+B": indicators of the genes, and sums or means of theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["combine_genes", "genes_of", "label_indicators"]

Vector = NDArray[np.float32]


def genes_of(label: str, separator: str) -> tuple[str, ...]:
    """Return the genes that a label names, in order.

    Examples
    --------
    >>> genes_of("KLF1+MAP2K6", "+")
    ('KLF1', 'MAP2K6')
    """
    return tuple(gene.strip() for gene in label.split(separator) if gene.strip())


def label_indicators(labels: Sequence[str], trained: Sequence[str], *, separator: str) -> dict[str, Vector]:
    """Return which genes each label names, among those that training labels name; none for a label that names none.

    Parameters
    ----------
    labels
        Labels, without the control.
    trained
        Labels of training perturbations, without the control; their genes, sorted, are the columns.

    Examples
    --------
    >>> found = label_indicators(["A", "A+X", "X"], ["A", "B+C"], separator="+")
    >>> {label: vector.tolist() for label, vector in found.items()}
    {'A': [1.0, 0.0, 0.0], 'A+X': [1.0, 0.0, 0.0]}
    """
    columns = sorted({gene for label in trained for gene in genes_of(label, separator)})
    place = {gene: number for number, gene in enumerate(columns)}
    found = {}
    for label in labels:
        known = [place[gene] for gene in genes_of(label, separator) if gene in place]
        if known:
            found[label] = np.zeros(len(columns), dtype=np.float32)
            found[label][known] = 1
    return found


def combine_genes(
    vectors: Mapping[str, NDArray[np.floating]], labels: Sequence[str], *, how: Literal["sum", "mean"], separator: str
) -> dict[str, Vector]:
    """Return the sum or mean of the genes' vectors, for labels without a vector of which every gene has one.

    Examples
    --------
    >>> vectors = {"A": np.array([1.0]), "B": np.array([3.0])}
    >>> {label: v.tolist() for label, v in combine_genes(vectors, ["A+B", "A+X"], how="mean", separator="+").items()}
    {'A+B': [2.0]}
    """
    found = {}
    for label in labels:
        genes = genes_of(label, separator)
        if label not in vectors and genes and all(gene in vectors for gene in genes):
            stacked = np.stack([vectors[gene] for gene in genes]).astype(np.float64)
            found[label] = (stacked.sum(axis=0) if how == "sum" else stacked.mean(axis=0)).astype(np.float32)
    return found
