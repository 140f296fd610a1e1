"""Features of labels that name several genes, as "A+B": indicators of the genes, and sums or means of theirs."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pertcast.files.labels import is_control_name

__all__ = ["combine_genes", "genes_of", "label_indicators"]

Vector = NDArray[np.float32]


def genes_of(label: str, separator: str, *, control: str = "", known: Container[str] = ()) -> tuple[str, ...]:
    """Return the genes that a label names, in order.

    Of several parts, one that is the control, or another name for it that is not `known` as a gene, names no gene.

    Examples
    --------
    >>> genes_of("KLF1+MAP2K6", "+"), genes_of("KLF1+ctrl", "+", control="ctrl")
    (('KLF1', 'MAP2K6'), ('KLF1',))
    """
    parts = tuple(part.strip() for part in label.split(separator) if part.strip())
    if len(parts) < 2 or not control:
        return parts
    return tuple(part for part in parts if part != control and (part in known or not is_control_name(part, control)))


def label_indicators(
    labels: Sequence[str], trained: Sequence[str], *, separator: str, control: str = ""
) -> dict[str, Vector]:
    """Return which genes each label names, among those that training labels name; none for a label that names none.

    Parameters
    ----------
    labels
        Labels, without the control.
    trained
        Labels of training perturbations, without the control; their genes, sorted, are the columns.
    separator, control
        What is between two genes of a label, and the control label, which names none.

    Examples
    --------
    >>> found = label_indicators(["A", "A+X", "X"], ["A", "B+C"], separator="+")
    >>> {label: vector.tolist() for label, vector in found.items()}
    {'A': [1.0, 0.0, 0.0], 'A+X': [1.0, 0.0, 0.0]}
    """
    columns = sorted({gene for label in trained for gene in genes_of(label, separator, control=control)})
    place = {gene: number for number, gene in enumerate(columns)}
    found = {}
    for label in labels:
        known = [place[gene] for gene in genes_of(label, separator, control=control) if gene in place]
        if known:
            found[label] = np.zeros(len(columns), dtype=np.float32)
            found[label][known] = 1
    return found


def combine_genes(
    vectors: Mapping[str, NDArray[np.floating]],
    labels: Sequence[str],
    *,
    how: Literal["none", "sum", "mean"],
    separator: str,
    control: str = "",
) -> dict[str, Vector]:
    """Return the vectors of labels that have none of their own, from those of their genes.

    A label of one gene and the control has the vector of the gene, whatever `how` says; one of several genes has their
    sum or mean, where every gene has a vector.

    Examples
    --------
    >>> vectors = {"A": np.array([1.0]), "B": np.array([3.0])}
    >>> found = combine_genes(vectors, ["A+B", "A+X", "A+ctrl"], how="mean", separator="+", control="ctrl")
    >>> {label: v.tolist() for label, v in found.items()}
    {'A+B': [2.0], 'A+ctrl': [1.0]}
    """
    found = {}
    for label in labels:
        genes = genes_of(label, separator, control=control, known=vectors)
        if label in vectors or not genes or not all(gene in vectors for gene in genes):
            continue
        if len(genes) == 1 or how != "none":
            stacked = np.stack([vectors[gene] for gene in genes]).astype(np.float64)
            found[label] = (stacked.mean(axis=0) if how == "mean" else stacked.sum(axis=0)).astype(np.float32)
    return found
