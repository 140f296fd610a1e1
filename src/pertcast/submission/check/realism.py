"""Measure how realistic a prediction's cells are: the null test, variance, zeros, depth.

Real control cells are split into two random halves. The second half is the reference. The prediction's control cells,
the cells of its targets, and the first half are each compared with it. The first half shows what cells without an
effect should give. Samples of both files are read, and nothing here makes a prediction invalid.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.errors import DataError, Problem
from pertcast.files.artefacts import manifest_origin
from pertcast.files.h5ad import H5adReader, open_h5ad
from pertcast.files.obs import near_misses
from pertcast.files.scales import Scale, ScaleEvidence, normalise_log1p
from pertcast.progress import SILENT, Progress
from pertcast.seasons import Season
from pertcast.seasons import season as season_by_name
from pertcast.stats.draws import generator
from pertcast.stats.realism import Likeness, Reference, compare_cells


@dataclass(frozen=True)
class ContextRealism:
    """The realism of one context, or of the whole prediction."""

    context: str  # Its name, "" where the season has one
    real: Likeness  # Real control cells against other real ones: what to compare with
    # The prediction's control cells against the same, as many as of `real`; ``None`` if it has none
    null: Likeness | None
    targets: Likeness | None  # A sample of its targets, the median of each number over them; ``None`` without targets
    # ``real``, ``null``, ``targets`` → quantiles .1, .5, .9 of a cell's counts; of sides in counts
    totals: Mapping[str, tuple[float, float, float]]

    @property
    def verdicts(self) -> tuple[tuple[str, bool, str], ...]:
        """Questions about the cells without an effect, whether each holds, and the numbers."""
        if self.null is None:
            return ()
        most = 1.5 * self.real.de_calls + 2
        middle, zeros = self.null.variance_ratio[1], 100 * self.null.zero_difference[1]
        return (
            (
                f"without an effect at most {most:.0f} genes are called DE",
                self.null.de_calls <= most,
                f"{self.null.de_calls}; real cells against real ones give {self.real.de_calls}",
            ),
            ("the median variance is 0.9 to 1.1 of the real one", 0.9 <= middle <= 1.1, f"{middle:.2f}"),
            ("zeros are within 2 points of the real ones", abs(zeros) <= 2, f"{zeros:+.1f} points"),
        )


@dataclass(frozen=True)
class RealismReport:
    """How realistic the cells of a prediction are.

    Attributes
    ----------
    path, against
        The prediction, and the file of real control cells.
    scale, target_sum
        The prediction's scale, and what both sides are normalised to.
    contexts
        One for each context.
    notes
        Sentences that the user should read.
    """

    path: str
    against: str
    scale: Scale
    target_sum: float
    contexts: tuple[ContextRealism, ...]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values; undefined numbers are null."""
        result: dict[str, Any] = _plain(dataclasses.asdict(self))
        for plain, context in zip(result["contexts"], self.contexts, strict=True):
            plain["verdicts"] = [list(verdict) for verdict in context.verdicts]
        return result


def _plain(value: object) -> Any:
    if isinstance(value, Likeness):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_MOST_CELLS = 2000
_MOST_TARGETS = 20
_CELLS_OF_TARGET = 100
_SAME_TOTAL = 0.01


class SampledCells(NamedTuple):
    """Sampled rows of a file: their stored values, and the position of each requested row."""

    values: sparse.csr_matrix
    scale: Scale
    place: NDArray[np.int64]

    def at(self, rows: NDArray[np.int64]) -> sparse.csr_matrix:
        """Return the values of some of these rows."""
        return self.values[self.place[rows]]


class Picked(NamedTuple):
    """Rows of a prediction's control cells, and of the cells of some targets."""

    null: NDArray[np.int64]
    targets: tuple[NDArray[np.int64], ...]

    @property
    def all_rows(self) -> tuple[NDArray[np.int64], ...]:
        """All rows, group by group."""
        return (self.null, *self.targets)


def labels_of(reader: H5adReader, column: str) -> NDArray[np.str_]:
    """Return the label of each cell, "" if it has none."""
    values = reader.obs(column)
    return np.asarray(np.append(np.asarray(values.categories, dtype=str), "")[values.codes])


def contexts_of(reader: H5adReader, rules: Season) -> NDArray[np.str_]:
    """Return the context of each cell, "" if the season has one."""
    if rules.context_column is None:
        return np.zeros(reader.num_cells, dtype="U1")
    return labels_of(reader, rules.context_column)


def real_rows(
    real: H5adReader, rules: Season, contexts: NDArray[np.str_], where: Mapping[str, str], notes: list[str]
) -> dict[str, NDArray[np.int64]]:
    """Return the rows of real control cells of each context; `where` names required labels."""
    keep = np.ones(real.num_cells, dtype=bool)
    for column, wanted in where.items():
        of_column = labels_of(real, column)
        if wanted not in of_column:
            there = sorted(set(of_column.tolist()))
            place, remedy = (
                f"{real.path}, obs[{column!r}]",
                f"there is {', '.join(near_misses(wanted, there) or there)}",
            )
            raise DataError(problems=[Problem(place, f"no cell has {wanted!r}", remedy)])
        keep &= of_column == wanted
    if rules.pert_column in real.obs_columns:
        keep &= labels_of(real, rules.pert_column) == rules.control_label
    if rules.context_column is not None and rules.context_column in real.obs_columns:
        of_cell = labels_of(real, rules.context_column)
    else:
        of_cell = None
        if rules.context_column is not None:
            notes.append(
                f"{real.path} has no column {rules.context_column!r}: all its cells are used for every context"
            )
    found = {
        context: np.flatnonzero(keep if of_cell is None else keep & (of_cell == context))
        for context in np.unique(contexts).tolist()
    }
    few = [context for context, rows in found.items() if len(rows) < 4]
    if few:
        message = f"expected four real control cells or more, got {len(found[few[0]])}"
        place = f"{real.path}, context {few[0]!r}" if few[0] else str(real.path)
        remedy = f"give a file with {rules.control_label!r} cells in {rules.pert_column!r}, or of control cells alone"
        raise DataError(problems=[Problem(place, message, remedy)])
    return found


def pick_rows(labels: NDArray[np.str_], here: NDArray[np.bool_], rules: Season, seed: int, context: str) -> Picked:
    """Draw control cells and cells of some targets, each target independently of the others."""
    random = generator(seed, "realism", context)
    null = _some(np.flatnonzero(here & (labels == rules.control_label)), _MOST_CELLS, random)
    targets = np.array(sorted(set(labels[here].tolist()) - {rules.control_label}))
    chosen = np.sort(random.permutation(len(targets))[:_MOST_TARGETS])
    cells = [np.flatnonzero(here & (labels == targets[place])) for place in chosen]
    return Picked(null, tuple(_some(rows, _CELLS_OF_TARGET, random) for rows in cells if len(rows) > 1))


def _some(rows: NDArray[np.int64], most: int, random: np.random.Generator) -> NDArray[np.int64]:
    return rows if len(rows) <= most else np.sort(random.choice(rows, most, replace=False))


def halves_of(rows: NDArray[np.int64], seed: int, context: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return two random halves of some rows, of bounded size."""
    shuffled = generator(seed, "realism", "halves", context).permutation(rows)
    size = min(len(rows) // 2, _MOST_CELLS)
    return shuffled[:size], shuffled[size : 2 * size]


def columns_of(made: H5adReader, real: H5adReader) -> NDArray[np.int64] | None:
    """Return the column of each gene in the real file; ``None`` if they are the same."""
    if made.genes == real.genes:
        return None
    place = {gene: column for column, gene in enumerate(real.genes)}
    lost = [gene for gene in made.genes if gene not in place]
    if lost:
        message = f"{len(lost):,} of the {len(made.genes):,} genes of the prediction are not there: {lost[0]!r} ..."
        raise DataError(problems=[Problem(f"{real.path}, var_names", message, "give cells with these genes")])
    return np.array([place[gene] for gene in made.genes], dtype=np.int64)


def read_rows(
    reader: H5adReader, rows: NDArray[np.int64], columns: NDArray[np.int64] | None, progress: Progress
) -> SampledCells:
    """Read some rows in one pass over the file."""
    wanted = np.zeros(reader.num_cells, dtype=bool)
    wanted[rows] = True
    evidence = ScaleEvidence(str(reader.path), genes=reader.genes)
    blocks = []
    with progress.task(f"read {reader.path.name}", reader.num_cells, "cells") as advance:
        for first, block in reader.chunks():
            mine = np.flatnonzero(wanted[first : first + block.shape[0]])
            if len(mine):
                part = block[mine]
                evidence.add_csr(part, first_cell=first)
                blocks.append((part if columns is None else part[:, columns]).astype(np.float32))
            advance(block.shape[0])
    return SampledCells(sparse.vstack(blocks, format="csr"), evidence.verdict(), np.cumsum(wanted) - 1)


def totals_of(values: sparse.csr_matrix, scale: Scale) -> NDArray[np.float64]:
    """Return the total of each cell, before log1p if needed."""
    linear = values if scale == "counts" else values.expm1()
    return np.asarray(linear.sum(axis=1, dtype=np.float64)).ravel()


def common_total(cells: SampledCells) -> float:
    """Return the median total of cells."""
    return float(np.median(totals_of(cells.values, cells.scale))) or 1.0


def to_log1p(values: sparse.csr_matrix, cells: SampledCells, target_sum: float) -> sparse.csr_matrix:
    """Return log1p values normalised to a total; log1p cells are rescaled together."""
    if cells.scale == "counts":
        return normalise_log1p(values, totals_of(values, "counts"), target_sum)
    factor = target_sum / common_total(cells)
    if abs(factor - 1) <= _SAME_TOTAL:
        return values
    return (values.expm1() * factor).log1p().astype(np.float32)


def realism(
    path: Path,
    against: Path,
    *,
    season: str | Season,
    rules: Mapping[str, object] | None = None,
    where: Mapping[str, str] | None = None,
    progress: Progress = SILENT,
) -> RealismReport:
    """Compare a prediction with real control cells.

    Parameters
    ----------
    path
        The prediction, an h5ad file in counts or log1p.
    against
        Real control cells, an h5ad file in counts or log1p with all genes of the prediction. Where it has the season's
        column of targets, its control cells are taken, else all; with a column of contexts, those of each context.
        Best are cells that the model has not trained on, and not those that cells were made of.
    season, rules
        Which columns and labels hold; rules overridden by name.
    where
        obs column → label that the real cells must have, for a file of several cell lines. Where it is not given and
        the prediction's manifest says which context it is of, cells of that context are taken.

    Raises
    ------
    DataError
        If a file cannot be read, genes are missing, or a context has fewer than four real control cells.
    """
    named = season_by_name(season, rules) if isinstance(season, str) else season.override(rules or {})
    notes: list[str] = []
    with open_h5ad(path) as made, open_h5ad(against) as real:
        columns = columns_of(made, real)
        labels, contexts = labels_of(made, named.pert_column), contexts_of(made, named)
        where = _own_context(path, real, named) if where is None else where
        notes += [f"real cells are those with {label!r} in {column!r}" for column, label in where.items()]
        rows_of = real_rows(real, named, contexts, where, notes)
        picked = {context: pick_rows(labels, contexts == context, named, 0, context) for context in rows_of}
        ours = read_rows(
            made, np.concatenate([rows for pick in picked.values() for rows in pick.all_rows]), None, progress
        )
        kept = {context: halves_of(rows, 0, context) for context, rows in rows_of.items()}
        theirs = read_rows(real, np.concatenate([half for pair in kept.values() for half in pair]), columns, progress)
    target_sum = common_total(ours) if ours.scale == "log1p" else common_total(theirs)
    found = []
    for context, pick in picked.items():
        if not len(pick.null):
            notes.append(_without_controls(named, context))
        found.append(_compare(context, pick, kept[context], ours, theirs, target_sum))
    return RealismReport(str(path), str(against), ours.scale, target_sum, tuple(found), tuple(dict.fromkeys(notes)))


def _own_context(path: Path, real: H5adReader, rules: Season) -> dict[str, str]:
    """Return the column of cell types and the context of a prediction, if its manifest and file have them."""
    origin = manifest_origin(path)
    experiment = {} if origin is None else origin.experiment
    columns, submission = experiment.get("columns", {}), experiment.get("submission", {})
    dataset = submission.get("dataset") or next(iter(experiment.get("datasets", {})), None)
    own = columns.get("of", {}).get(dataset, {})
    column, context = own.get("cell_type") or columns.get("cell_type"), submission.get("context")
    if rules.context_column is not None or column not in real.obs_columns or column is None:
        return {}
    there = set(real.obs(column).remove_unused_categories().categories)
    if len(there) == 1:
        return {}
    if context in there:
        return {str(column): str(context)}
    message = (
        f"{len(there)} contexts, and the prediction does not say which is its own: {', '.join(sorted(map(str, there)))}"
    )
    remedy = f"name it, for example --where {column}={sorted(map(str, there))[0]}"
    raise DataError(problems=[Problem(f"{real.path}, obs[{column!r}]", message, remedy)])


def _without_controls(rules: Season, context: str) -> str:
    place = f" of context {context}" if context else ""
    return (
        f"there are no {rules.control_label!r} cells{place}: cells without an effect are compared where a prediction "
        "has some, so make one with predicted controls"
    )


def _compare(
    context: str,
    pick: Picked,
    halves: Sequence[NDArray[np.int64]],
    ours: SampledCells,
    theirs: SampledCells,
    target_sum: float,
) -> ContextRealism:
    first, second = halves
    number = min(len(first), len(pick.null)) if len(pick.null) > 1 else len(first)
    reference = Reference(to_log1p(theirs.at(second), theirs, target_sum))
    real = compare_cells(to_log1p(theirs.at(first[:number]), theirs, target_sum), reference)
    null = None
    if len(pick.null) > 1:
        spaced = pick.null[np.linspace(0, len(pick.null) - 1, number).astype(np.int64)]
        null = compare_cells(to_log1p(ours.at(spaced), ours, target_sum), reference)
    each = [compare_cells(to_log1p(ours.at(rows), ours, target_sum), reference) for rows in pick.targets]
    totals = {"real": _quantiles(theirs, first)} if theirs.scale == "counts" else {}
    if ours.scale == "counts":
        totals |= {"null": _quantiles(ours, pick.null)} if len(pick.null) else {}
        totals |= {"targets": _quantiles(ours, np.concatenate(pick.targets))} if pick.targets else {}
    return ContextRealism(context, real, null, _middle(each), totals)


def _middle(each: Sequence[Likeness]) -> Likeness | None:
    """Return the median of each number."""
    if not each:
        return None
    return Likeness(
        num_cells=sum(like.num_cells for like in each),
        de_calls=int(np.median([like.de_calls for like in each])),
        variance_ratio=tuple(np.median([like.variance_ratio for like in each], axis=0).tolist()),
        zero_difference=tuple(np.median([like.zero_difference for like in each], axis=0).tolist()),
        correlation=float(np.median([like.correlation for like in each])),
    )


def _quantiles(cells: SampledCells, rows: NDArray[np.int64]) -> tuple[float, float, float]:
    low, middle, high = np.quantile(totals_of(cells.at(rows), "counts"), [0.1, 0.5, 0.9]).tolist()
    return low, middle, high
