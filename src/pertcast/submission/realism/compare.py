"""How like real cells a prediction's cells are, beside what real cells give: the null test, variance, zeros, depth.

Real control cells are put in two halves at random. The second half is the reference: control cells of the prediction,
cells of its targets, and real cells of the first half are each compared with it. What the first half gives is what
cells without an effect should give. Reads samples of both files; nothing here says that a prediction is not valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pertcast.errors import DataError, Problem
from pertcast.files.h5ad import H5adReader, open_h5ad
from pertcast.files.origin import manifest_origin
from pertcast.progress import SILENT, Progress
from pertcast.seasons import Season
from pertcast.seasons import season as season_by_name
from pertcast.stats.realism import Likeness, Reference, compare_cells
from pertcast.submission.realism.report import ContextRealism, RealismReport
from pertcast.submission.realism.sample import (
    Picked,
    SampledCells,
    columns_of,
    common_total,
    contexts_of,
    halves_of,
    labels_of,
    pick_rows,
    read_rows,
    real_rows,
    to_log1p,
    totals_of,
)

__all__ = ["realism"]


def realism(
    path: Path,
    against: Path,
    *,
    season: str | Season,
    rules: Mapping[str, object] | None = None,
    where: Mapping[str, str] | None = None,
    seed: int = 0,
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
    seed
        Key of the halves and samples.

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
        picked = {context: pick_rows(labels, contexts == context, named, seed, context) for context in rows_of}
        ours = read_rows(
            made, np.concatenate([rows for pick in picked.values() for rows in pick.all_rows]), None, progress
        )
        kept = {context: halves_of(rows, seed, context) for context, rows in rows_of.items()}
        theirs = read_rows(real, np.concatenate([half for pair in kept.values() for half in pair]), columns, progress)
    target_sum = common_total(ours) if ours.scale == "log1p" else common_total(theirs)
    found = []
    for context, pick in picked.items():
        if not len(pick.null):
            notes.append(_without_controls(named, context))
        found.append(_compare(context, pick, kept[context], ours, theirs, target_sum))
    return RealismReport(str(path), str(against), ours.scale, target_sum, tuple(found), tuple(dict.fromkeys(notes)))


def _own_context(path: Path, real: H5adReader, rules: Season) -> dict[str, str]:
    """Return the column of cell types and the context of a prediction, as far as its manifest and the file say them.

    A file of several cell lines of which none is known to be the prediction's is refused.
    """
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
