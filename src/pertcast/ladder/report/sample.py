"""A bounded sample of cells of each group, from a store or an h5ad file, on one scale and over one list of genes.

Legend of shapes: n sampled cells, P groups, C contexts, G genes. Codes 0 to P - 1 are groups, P + c the controls of
context c. Which cells are taken depends on the seed and on the group alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.data.store import Split, Store
from pertcast.errors import DataError
from pertcast.files.expression import ScaleEvidence, normalise_log1p
from pertcast.files.h5ad import open_h5ad
from pertcast.progress import SILENT, Progress
from pertcast.seasons import Season
from pertcast.stats.draws import generator

__all__ = ["Cells", "Group", "Limits", "sample_h5ad", "sample_store"]

_SEED = 0


class Group(NamedTuple):
    """Cells of one target in one context; the context is empty where there is one alone."""

    context: str
    target: str

    @property
    def label(self) -> str:
        """How a reader finds it."""
        return f"{self.target} ({self.context})" if self.context else self.target


class Limits(NamedTuple):
    """How much is read: groups, cells in all, cells of a group, control cells of a context."""

    groups: int = 300
    cells: int = 12_000
    cells_per_group: int = 200
    controls: int = 2_000

    def per_group(self, num_groups: int) -> int:
        """Return how many cells of each group are taken."""
        return max(20, min(self.cells_per_group, self.cells // max(1, num_groups)))


@dataclass(frozen=True, eq=False)
class Cells:
    """A sample of cells.

    Attributes
    ----------
    title
        What they are: ``predicted``, ``training``, ``held out``, ``real``.
    genes
        Names.
    groups, contexts
        What the codes mean.
    log1p
        (n, G) CSR float32.
    codes
        (n,) int64.
    num_cells
        (P,) cells of each group before sampling.
    """

    title: str
    genes: tuple[str, ...]
    groups: tuple[Group, ...]
    contexts: tuple[str, ...]
    log1p: sparse.csr_matrix
    codes: NDArray[np.int64]
    num_cells: tuple[int, ...]

    def rows(self, code: int) -> NDArray[np.int64]:
        """Return the rows of a group or of controls."""
        return np.flatnonzero(self.codes == code)

    def control_code(self, group: Group) -> int:
        """Return the code of the controls of a group's context."""
        return len(self.groups) + self.contexts.index(group.context)

    def on_genes(self, genes: Sequence[str]) -> Cells:
        """Return the cells over other genes, all of which must be among these."""
        if tuple(genes) == self.genes:
            return self
        place = {gene: number for number, gene in enumerate(self.genes)}
        columns = self.log1p.tocsc()[:, [place[gene] for gene in genes]].tocsr()
        return Cells(self.title, tuple(genes), self.groups, self.contexts, columns, self.codes, self.num_cells)


def _draw(rows: NDArray[np.int64], number: int, *key: str) -> NDArray[np.int64]:
    if len(rows) <= number:
        return rows
    return np.sort(generator(_SEED, "report", *key).choice(rows, number, replace=False))


def sample_h5ad(
    path: Path,
    season: Season,
    *,
    title: str,
    target_sum: float | None,
    limits: Limits = Limits(),  # noqa: B008 (a frozen record)
    progress: Progress = SILENT,
) -> Cells:
    """Sample the cells of an h5ad file.

    Parameters
    ----------
    path
        Cells on either scale; counts are normalised to `target_sum`, else to the sample's median, then log1p.
    season
        Whose labels they bear.
    title
        What they are.

    Raises
    ------
    DataError
        If the file cannot be read, has no such labels, or its values are on no one scale.
    """
    with open_h5ad(path) as reader:
        labels = np.asarray(reader.obs(season.pert_column), dtype=object).astype(str)
        column = season.context_column
        has_contexts = column is not None and column in reader.obs_columns
        contexts = np.asarray(reader.obs(column), dtype=object).astype(str) if column and has_contexts else None
        if contexts is None:
            contexts = np.full(len(labels), "", dtype="<U1")
        pairs = dict.fromkeys(zip(contexts.tolist(), labels.tolist(), strict=True))
        groups = tuple(Group(*pair) for pair in pairs if pair[1] != season.control_label)[: limits.groups]
        if not groups:
            raise DataError(f"{path}: no cells but controls; give a file with perturbed cells")
        names = tuple(dict.fromkeys(group.context for group in groups))
        codes, sizes = np.full(len(labels), -1, dtype=np.int64), []
        wanted = [*groups, *(Group(name, season.control_label) for name in names)]
        for code, group in enumerate(wanted):
            rows = np.flatnonzero((labels == group.target) & (contexts == group.context))
            sizes.append(len(rows))
            number = limits.per_group(len(groups)) if code < len(groups) else limits.controls
            codes[_draw(rows, number, title, *group)] = code
        blocks = []
        with progress.task(f"read {path.name}", len(labels), "cells") as advance:
            for first, block in reader.chunks():
                kept = codes[first : first + block.shape[0]] >= 0
                blocks.append(block[kept].astype(np.float32))
                advance(block.shape[0])
        log1p = _as_log1p(sparse.vstack(blocks, format="csr"), path, reader.genes, target_sum)
        return Cells(title, reader.genes, groups, names, log1p, codes[codes >= 0], tuple(sizes[: len(groups)]))


def _as_log1p(
    values: sparse.csr_matrix, path: Path, genes: Sequence[str], target_sum: float | None
) -> sparse.csr_matrix:
    evidence = ScaleEvidence(str(path), genes=genes)
    evidence.add_csr(values)
    if evidence.verdict() == "log1p":
        return values
    totals = np.asarray(values.sum(axis=1), dtype=np.float64).ravel()
    return normalise_log1p(values, totals, target_sum or float(np.median(totals)))


def sample_store(
    store: Store,
    groups: Sequence[Group],
    *,
    split: Split,
    title: str,
    within: str | None = None,
    dataset: str | None = None,
    limits: Limits = Limits(),  # noqa: B008 (a frozen record)
) -> Cells | None:
    """Sample those cells of a store that some groups have in some splits; ``None`` where there are none.

    Parameters
    ----------
    store, groups, split, title
        Which cells, and what they are.
    within
        The context of groups that name none; all contexts where not given.
    dataset
        The dataset whose cells are wanted; all datasets where not given.
    limits
        How many.
    """
    contexts = {group.context: group.context or within for group in groups}
    codes_of = {
        name: store.contexts.index(there) if there else None
        for name, there in contexts.items()
        if there is None or there in store.contexts
    }
    of = store.datasets.index(dataset) if dataset in store.datasets else None
    there = []
    for group in groups:
        pert = store.perts.index(group.target) if group.target in store.perts else None
        if pert is not None and group.context in codes_of:
            rows = store.rows(split=split, dataset=of, context=codes_of[group.context], pert=pert)
            if len(rows):
                there.append((group, rows))
    names = tuple(dict.fromkeys(group.context for group, _ in there))
    controls = [store.rows(split=split, dataset=of, context=codes_of[name], pert=store.control_code) for name in names]
    if not there or not all(map(len, controls)):
        return None
    number = limits.per_group(len(groups))
    drawn = [_draw(rows, number, title, *group) for group, rows in there]
    drawn += [_draw(rows, limits.controls, title, name) for name, rows in zip(names, controls, strict=True)]
    codes = np.repeat(np.arange(len(drawn)), [len(rows) for rows in drawn])
    kept = tuple(group for group, _ in there)
    sizes = tuple(len(rows) for _, rows in there)
    return Cells(title, store.genes, kept, names, store.csr(np.concatenate(drawn)), codes, sizes)
