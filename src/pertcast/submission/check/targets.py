"""Check genes and targets against the season's lists: all of them, no others, with the requested cells.

The cells of a target are right if they are those of the list or, if the season leaves them to the list, those that the
budget gives under the cap with as many control cells as the file has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pertcast.errors import Problem, SubmissionError
from pertcast.files.obs import near_misses
from pertcast.files.season_lists import TargetList
from pertcast.seasons import Season
from pertcast.submission.cell_budget import plan_budget
from pertcast.submission.check.labels import Groups, control_alikes
from pertcast.submission.check.report import CheckItem, Findings, counted, named

_TOTALS_DIFFER = 1.5
_NUM_NAMED = 10
Group = tuple[str, str]


def check_targets(
    groups: Groups, season: Season, *, path: Path, genes: tuple[str, ...], targets: TargetList | None, list_name: str
) -> Findings:
    """Compare labels and cells with the target list; without one, only look for misspelt gene symbols."""
    question = f"target list as {list_name} has it"
    place = f"{path}, obs[{season.pert_column!r}]"
    aside = {season.control_label, *control_alikes(groups.labels, season)}
    labels = [label for label in groups.labels if label not in aside]
    facts = {"targets": len(labels)}
    if targets is None:
        problems, notes = _without_list(labels, genes, place)
        if season.cells_per_target is not None:
            problems += _without_list_but_even(labels, groups, season, place)
        item = CheckItem("target list", ok=False if problems else None, evidence="not asked: no target list given")
        return Findings(tuple(problems), (item,), facts, tuple(notes))
    known = set(targets)
    extra = [label for label in labels if label not in known]
    missing = [target for target in targets if target not in set(labels)]
    problems = [Problem(place, *_extra(label, missing, targets, genes, list_name)) for label in extra[:_NUM_NAMED]]
    if len(extra) > _NUM_NAMED:
        problems.append(
            Problem(place, f"and {counted(len(extra) - _NUM_NAMED, 'more label')} that {list_name} does not have")
        )
    if missing:
        message = f"no cell for {len(missing):,} of {counted(len(targets), 'target')} of {list_name}: {named(missing)}"
        problems.append(Problem(place, message, "generate them; an unknown perturbation needs a feature"))
    there = {key: number for key, number in groups.cells.items() if key[1] in known}
    how = "cells not asked"
    if targets.n_cells is not None:
        contexts = groups.contexts if season.context_column else ("",)
        wanted = {(context, target): number for context in contexts for target, number in targets.requested().items()}
        how, count_problems = _counts(wanted, there, season, groups.num_controls, place, list_name)
        problems += count_problems
    evidence = f"{counted(len(labels), 'target')}, {counted(sum(there.values()), 'cell')}, {how}"
    if extra or missing:
        evidence = f"{counted(len(missing), 'target')} missing, {counted(len(extra), 'label')} not in the list"
    item = CheckItem(question, ok=not problems, evidence=evidence)
    return Findings(tuple(problems), (item,), facts, targets.notes)


def _extra(
    label: str, missing: list[str], targets: TargetList, genes: tuple[str, ...], list_name: str
) -> tuple[str, str]:
    near = near_misses(label, missing, num=1) or near_misses(label, targets.targets, num=1)
    invented = "" if label in set(genes) else ", nor a gene of the gene list"
    remedy = f"did you mean {near[0]!r}?" if near else "remove these cells"
    return f"{label!r} is no target of {list_name}{invented}", remedy


def _without_list(labels: list[str], genes: tuple[str, ...], place: str) -> tuple[list[Problem], list[str]]:
    known = set(genes)
    unknown = [label for label in labels if label not in known]
    folded = {gene.casefold(): gene for gene in genes}
    problems = [
        Problem(place, f"{label!r} is no gene of the gene list", f"did you mean {folded[label.casefold()]!r}?")
        for label in unknown
        if label.casefold() in folded
    ]
    others = [label for label in unknown if label.casefold() not in folded]
    notes = [f"targets that are no genes of the gene list: {named(others)}"] if others else []
    return problems[:_NUM_NAMED], notes


def _without_list_but_even(labels: list[str], groups: Groups, season: Season, place: str) -> list[Problem]:
    """Compare with the season's rules for every list: the number of targets and of cells of each."""
    problems = []
    if len(labels) != season.num_targets:
        message = f"expected {season.num_targets:,} targets, got {len(labels):,}"
        problems.append(Problem(place, message, "give the season's list with --targets to see which"))
    wanted = {(context, label): season.cells_per_target or 0 for context in groups.contexts for label in labels}
    there = {key: number for key, number in groups.cells.items() if key in wanted}
    return problems + _counts(wanted, there, season, groups.num_controls, place, f"season {season.name}")[1]


def check_totals(groups: Groups, season: Season, totals: NDArray[np.float64]) -> Findings:
    """Compare the median total of the targets' cells with the controls', on the counts scale."""
    labels = groups.label_of_row
    names = [str(name) for name in labels.categories]
    code = names.index(season.control_label) if season.control_label in names else -1
    known = ~np.isnan(totals) & (labels.codes >= 0)
    control = labels.codes == code
    if code < 0 or not (known & control).any() or not (known & ~control).any():
        return Findings((), ())
    ours, theirs = float(np.median(totals[known & ~control])), float(np.median(totals[known & control]))
    facts = {"median_total_targets": ours, "median_total_controls": theirs}
    if max(ours, theirs) <= _TOTALS_DIFFER * min(ours, theirs):
        return Findings((), (), facts)
    note = (
        f"the targets' cells have a median total of {ours:,.0f}, the control cells {theirs:,.0f} (log1p undone): "
        "they were normalised to different totals, or have another depth; bring both to one"
    )
    return Findings((), (), facts, (note,))


def check_zero_targets(groups: Groups, season: Season, zero_rows: NDArray[np.int64], *, path: Path) -> Findings:
    """Find targets whose cells are all 0, if the season forbids them."""
    if season.zero_targets == "allowed" or not len(zero_rows):
        return Findings((), ())
    codes = np.asarray(groups.label_of_row.codes)
    size = len(groups.label_of_row.categories) + 1
    empty = np.bincount(codes[zero_rows] + 1, minlength=size) == np.bincount(codes + 1, minlength=size)
    there = np.bincount(codes + 1, minlength=size) > 0
    names = [str(groups.label_of_row.categories[int(code)]) for code in np.flatnonzero((empty & there)[1:])]
    if not names:
        return Findings((), ())
    message = f"no value above 0 in any cell of {counted(len(names), 'target')}: {named(names)}"
    problem = Problem(f"{path}, X", message, "generate these targets again: the model did not run for them")
    item = CheckItem("no target of zeros alone", ok=False, evidence=counted(len(names), "target"))
    return Findings((problem,), (item,))


def _counts(
    wanted: Mapping[Group, int],
    there: Mapping[Group, int],
    season: Season,
    num_controls: int,
    place: str,
    list_name: str,
) -> tuple[str, list[Problem]]:
    """Return how the cells follow the list, and a problem if they do not; missing targets are another rule's."""
    names = {key: f"{key[0]}/{key[1]}" if key[0] else key[1] for key in wanted}
    due, rule = wanted, list_name
    if dict(there) != dict(wanted) and season.cells_per_target is None:
        try:
            budget = plan_budget(
                {names[key]: number for key, number in wanted.items()}, cap=season.max_cells, num_controls=num_controls
            )
        except SubmissionError:
            budget = None
        if budget is not None and budget.alpha_fraction < 1:
            due = {key: budget.cells[names[key]] for key in wanted}
            rule = f"{list_name} scaled by {budget.alpha:.4f} (for {num_controls:,} controls under the cap)"
    present = {target for _, target in there}
    wrong = [key for key in wanted if key[1] in present and there.get(key, 0) != due[key]]
    if not wrong:
        return f"each as in {rule}", []
    some = wrong[:_NUM_NAMED]
    shown = "; ".join(f"{names[key]}: expected {due[key]:,}, got {there.get(key, 0):,}" for key in some)
    more = f"; and {len(wrong) - _NUM_NAMED:,} more" if len(wrong) > _NUM_NAMED else ""
    message = f"{counted(len(wrong), 'target')} with other cells than {rule}: {shown}{more}"
    return f"{counted(len(wrong), 'target')} with other cells", [Problem(place, message, "generate just as many")]


_NUM_SUGGESTIONS = 10


def check_genes(got: tuple[str, ...], expected: tuple[str, ...], *, path: Path, genes_path: Path) -> Findings:
    """Compare genes; another order is only noted, since packing reorders them."""
    question = "genes of the list"
    if got == expected:
        item = CheckItem(question, ok=True, evidence=f"{len(got):,} genes in the order of {genes_path.name}")
        return Findings((), (item,))
    place = f"{path}, var_names"
    problems = []
    if len(got) != len(expected):
        message = f"expected {len(expected):,} genes, got {len(got):,}"
        problems.append(Problem(place, message, f"give just the genes of {genes_path.name}"))
    there, wanted = set(got), set(expected)
    missing = [gene for gene in expected if gene not in there]
    extra = [gene for gene in got if gene not in wanted]
    if missing:
        message = f"{counted(len(missing), 'gene')} of {genes_path.name} missing: {named(missing)}"
        problems.append(Problem(place, message, "predict them too, or fill them in knowingly"))
    if extra:
        message = f"{counted(len(extra), 'gene')} not in {genes_path.name}: {named(extra)}"
        problems.append(Problem(place, message, _spelling(extra, missing) or "remove them"))
    if problems:
        evidence = f"{len(missing):,} missing, {len(extra):,} not in {genes_path.name}"
        return Findings(tuple(problems), (CheckItem(question, ok=False, evidence=evidence),))
    first = next(i for i, (one, other) in enumerate(zip(got, expected, strict=True)) if one != other)
    where = f"from position {first} on: expected {expected[first]!r}, got {got[first]!r}"
    note = f"genes are in another order than in {genes_path.name} {where}; `pertcast pack` puts them in its order"
    item = CheckItem(question, ok=True, evidence=f"{len(got):,} genes, in another order than {genes_path.name}")
    return Findings((), (item,), notes=(note,))


def _spelling(extra: list[str], missing: list[str]) -> str:
    """Return the missing gene that each of the first extra ones may be meant for."""
    pairs = [(gene, near_misses(gene, missing, num=1)) for gene in extra[:_NUM_SUGGESTIONS]]
    meant = [f"{near[0]!r} for {gene!r}" for gene, near in pairs if near]
    return f"did you mean {', '.join(meant)}?" if meant else ""
