"""Genes of a prediction against the season's list: the same names, nothing else; another order is a note."""

from __future__ import annotations

from pathlib import Path

from pertcast.errors import Problem
from pertcast.files.frames import near_misses
from pertcast.submission.check.report import CheckItem, Findings, counted, named

__all__ = ["check_genes"]

_NUM_SUGGESTIONS = 10


def check_genes(got: tuple[str, ...], expected: tuple[str, ...], *, path: Path, genes_path: Path) -> Findings:
    """Compare genes; where they are the list's in another order, a note says so, for packing puts them in order.

    Parameters
    ----------
    got, expected
        Names of the prediction's columns, unique; the season's list.
    path, genes_path
        The files they come from, for the messages.
    """
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
    """Return which missing gene each of the first extra ones may be meant for."""
    pairs = [(gene, near_misses(gene, missing, num=1)) for gene in extra[:_NUM_SUGGESTIONS]]
    meant = [f"{near[0]!r} for {gene!r}" for gene, near in pairs if near]
    return f"did you mean {', '.join(meant)}?" if meant else ""
