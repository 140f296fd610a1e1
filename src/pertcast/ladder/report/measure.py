"""What the report says of cells: effects, differential expression and principal components of bounded samples.

Legend of shapes: P groups, G genes, n cells. Effects are differences of mean log1p values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.files.cpus import available_cpus
from pertcast.ladder.report.sample import Cells, Group
from pertcast.stats.de import DeTable, differential_expression
from pertcast.stats.draws import generator
from pertcast.stats.effects import compare_effects, knockdown
from pertcast.stats.groups import group_cells

__all__ = ["Agreement", "Effects", "Plane", "agreement", "de_tables", "effects", "fit_plane", "with_controls"]


@dataclass(frozen=True, eq=False)
class Effects:
    """Mean effects of groups.

    Attributes
    ----------
    cells
        What they are of.
    effect
        (P, G) mean log1p less the mean of the context's controls.
    noise
        (P,) the size (L2 norm) that sampling alone gives to an effect of so many cells.
    left
        (P,) the share of the target's own gene that is left; NaN where it is not measured.
    """

    cells: Cells
    effect: NDArray[np.float64]
    noise: NDArray[np.float64]
    left: NDArray[np.float64]

    def of(self, group: Group) -> int | None:
        """Return the position of a group."""
        return self.cells.groups.index(group) if group in self.cells.groups else None


class Agreement(NamedTuple):
    """One group: a predicted effect beside a measured one."""

    group: Group
    predicted_cells: int
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
    """Return cells with the controls of others where they have none of their own."""
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
    """Return every group that both have, in the order of the prediction."""
    rows = []
    for place, group in enumerate(predicted.cells.groups):
        other = measured.of(group)
        if other is None:
            continue
        found = compare_effects(predicted.effect[place], measured.effect[other])
        rows.append(
            Agreement(
                group,
                predicted_cells=predicted.cells.num_cells[place],
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
    """Return the official statistics of each group against its controls, in rows of one; none without controls."""
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


def fit_plane(cells: Cells, genes: NDArray[np.int64] | None = None, *, num_cells: int = 1_500) -> Plane | None:
    """Return the first two principal components of cells; ``None`` where there are fewer than three.

    Parameters
    ----------
    cells
        Training cells; at most `num_cells` of them, drawn with a seed, are used.
    genes
        Positions of the genes to use; all where not given.
    """
    rows = np.arange(cells.log1p.shape[0])
    if len(rows) > num_cells:
        rows = np.sort(generator(0, "report", "plane").choice(rows, num_cells, replace=False))
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
