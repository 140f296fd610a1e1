"""Measure cells for the report: effects, DE and principal components of bounded samples.

Legend of shapes: P groups, G genes, n cells. Effects are differences of mean log1p values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import DataError
from pertcast.files.h5ad import open_h5ad
from pertcast.files.resources import available_cpus
from pertcast.files.scales import ScaleEvidence, normalise_log1p
from pertcast.progress import SILENT, Progress
from pertcast.seasons import Season
from pertcast.stats.de import DeTable, differential_expression
from pertcast.stats.draws import generator
from pertcast.stats.groups import group_cells
from pertcast.stats.metrics import compare_effects, knockdown

_SEED = 0

_PLANE_CELLS = 1_500


class Group(NamedTuple):
    """Cells of one target in one context; the context is empty if there is only one."""

    context: str
    target: str

    @property
    def label(self) -> str:
        """Its name for readers."""
        return f"{self.target} ({self.context})" if self.context else self.target


class Limits(NamedTuple):
    """How much is read: groups, all cells, cells of a group, control cells of a context."""

    groups: int = 300
    cells: int = 12_000
    cells_per_group: int = 200
    controls: int = 2_000

    def per_group(self, num_groups: int) -> int:
        """Return the number of cells taken from each group."""
        return max(20, min(self.cells_per_group, self.cells // max(1, num_groups)))


@dataclass(frozen=True, eq=False)
class Cells:
    """A sample of cells."""

    title: str  # What they are: ``predicted``, ``training``, ``held out``, ``real``
    genes: tuple[str, ...]  # Names
    groups: tuple[Group, ...]  # What the codes mean
    contexts: tuple[str, ...]
    log1p: sparse.csr_matrix  # (n, G) CSR float32
    codes: NDArray[np.int64]  # (n,) int64
    num_cells: tuple[int, ...]  # (P,) cells of each group before sampling

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
    """Sample the cells of an h5ad file."""
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
    """Sample the cells of a store in some groups and splits; ``None`` if there are none."""
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


@dataclass(frozen=True, eq=False)
class Effects:
    """Mean effects of groups."""

    cells: Cells  # What they are of
    effect: NDArray[np.float64]  # (P, G) mean log1p less the mean of the context's controls
    noise: NDArray[np.float64]  # (P,) the size (L2 norm) that sampling alone gives to an effect of so many cells
    left: NDArray[np.float64]  # (P,) the share of the target's own gene that is left; NaN if it is not measured

    def of(self, group: Group) -> int | None:
        """Return the position of a group."""
        return self.cells.groups.index(group) if group in self.cells.groups else None


class Agreement(NamedTuple):
    """A predicted effect beside a measured one, for one group."""

    group: Group
    predicted_size: float
    predicted_left: float
    measured_cells: int
    measured_size: float
    measured_noise: float
    measured_left: float
    correlation: float


class Plane(NamedTuple):
    """Two principal components: the genes' mean (G,), the loadings (2, G), and the shares of variance (2,)."""

    mean: NDArray[np.float64]
    loadings: NDArray[np.float64]
    shares: NDArray[np.float64]

    def project(self, log1p: sparse.csr_matrix) -> NDArray[np.float64]:
        """Return (n, 2) coordinates of cells."""
        return log1p @ self.loadings.T - self.mean @ self.loadings.T


def with_controls(cells: Cells, other: Cells) -> Cells:
    """Return cells with the controls of others if they have none."""
    missing = [name for name in cells.contexts if not len(cells.rows(cells.control_code(Group(name, ""))))]
    lacking = [name for name in missing if name in other.contexts]
    if not lacking:
        return cells
    taken = [other.rows(other.control_code(Group(name, ""))) for name in lacking]
    codes = [np.full(len(rows), cells.control_code(Group(name, ""))) for name, rows in zip(lacking, taken, strict=True)]
    log1p = sparse.vstack([cells.log1p, other.log1p[np.concatenate(taken)]], format="csr")
    return replace(cells, log1p=log1p, codes=np.concatenate([cells.codes, *codes]))


def _moments(log1p: sparse.csr_matrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean of each gene and the variance of that mean."""
    number = max(1, log1p.shape[0])
    wide = log1p.astype(np.float64)
    mean = np.asarray(wide.sum(axis=0)).ravel() / number
    square = np.asarray(wide.multiply(wide).sum(axis=0)).ravel() / number
    return mean, np.maximum(square - mean**2, 0.0) / max(1, number - 1)


def effects(cells: Cells) -> Effects:
    """Return the effects of all groups; a group without controls gets NaN."""
    position = {gene: number for number, gene in enumerate(cells.genes)}
    controls = {name: cells.rows(cells.control_code(Group(name, ""))) for name in cells.contexts}
    at_rest = {name: _moments(cells.log1p[rows]) if len(rows) else None for name, rows in controls.items()}
    effect = np.full((len(cells.groups), len(cells.genes)), np.nan)
    noise, left = np.full(len(cells.groups), np.nan), np.full(len(cells.groups), np.nan)
    for code, group in enumerate(cells.groups):
        control = at_rest[group.context]
        if control is None:
            continue
        mean, spread = _moments(cells.log1p[cells.rows(code)])
        effect[code] = mean - control[0]
        noise[code] = float(np.sqrt((spread + control[1]).sum()))
        own = position.get(group.target)
        if own is not None:
            left[code] = knockdown(float(mean[own]), float(control[0][own]))
    return Effects(cells, effect, noise, left)


def agreement(predicted: Effects, measured: Effects) -> list[Agreement]:
    """Return the agreement of every group that both have, in the order of the prediction."""
    rows = []
    for place, group in enumerate(predicted.cells.groups):
        other = measured.of(group)
        if other is None:
            continue
        found = compare_effects(predicted.effect[place], measured.effect[other])
        rows.append(
            Agreement(
                group,
                predicted_size=found.predicted_size,
                predicted_left=float(predicted.left[place]),
                measured_cells=measured.cells.num_cells[other],
                measured_size=found.measured_size,
                measured_noise=float(measured.noise[other]),
                measured_left=float(measured.left[other]),
                correlation=found.correlation,
            )
        )
    return rows


def de_tables(cells: Cells) -> dict[Group, DeTable]:
    """Return the official statistics of each group against its controls; none without controls."""
    tables = {}
    for name in cells.contexts:
        groups = [code for code, group in enumerate(cells.groups) if group.context == name]
        control = cells.control_code(Group(name, ""))
        if not len(cells.rows(control)):
            continue
        codes = np.full(len(cells.codes), -1, dtype=np.int64)
        for number, code in enumerate((*groups, control)):
            codes[cells.rows(code)] = number
        grouped = group_cells(cells.log1p, codes)
        ours, theirs = grouped.select(range(len(groups))), grouped.select([len(groups)])
        table = differential_expression(ours, theirs, threads=available_cpus())
        for number, code in enumerate(groups):
            tables[cells.groups[code]] = DeTable(*(values[number : number + 1] for values in table))
    return tables


def fit_plane(cells: Cells, genes: NDArray[np.int64] | None = None) -> Plane | None:
    """Return the first two principal components of cells; ``None`` for fewer than three."""
    rows = np.arange(cells.log1p.shape[0])
    if len(rows) > _PLANE_CELLS:
        rows = np.sort(generator(0, "report", "plane").choice(rows, _PLANE_CELLS, replace=False))
    used = np.arange(len(cells.genes)) if genes is None else genes
    block = cells.log1p[rows][:, used].toarray().astype(np.float64)
    if min(block.shape) < 3:
        return None
    mean = block.mean(axis=0)
    block -= mean
    _, sizes, directions = np.linalg.svd(block, full_matrices=False)
    if not sizes[0] > 0:
        return None
    largest = np.abs(directions[:2]).argmax(axis=1)
    directions = directions[:2] * np.sign(directions[[0, 1], largest])[:, None]
    whole_mean, loadings = np.zeros(len(cells.genes)), np.zeros((2, len(cells.genes)))
    whole_mean[used], loadings[:, used] = mean, directions
    return Plane(whole_mean, loadings, (sizes**2 / (sizes**2).sum())[:2])
