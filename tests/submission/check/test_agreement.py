"""Ours accepts what the season's official packer accepts and refuses what it refuses, but for the rules that
docs/strictness.md lists.

The official verdicts are recorded below. Where the official tools are there (importable, or named by PERTCAST_CELL_EVAL
and PERTCAST_VCC, the paths of their programs), the record itself is tested.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import agreement_cases as do
from agreement_cases import Change, Draft
from pertcast.errors import PertcastError
from pertcast.seasons import season as season_of
from pertcast.submission.pack import pack, unpack

STRICTNESS = Path(__file__).parents[3] / "docs" / "strictness.md"
YES, NO = "accepted", "refused"


@dataclass(frozen=True)
class Case:
    """What is done to a valid submission, what the official packer says, and which rule of ours is stricter, if one."""

    change: Change
    official: str
    stricter: str | None = None


def keep(draft: Draft) -> None:
    """Leave the submission as it is."""


CASES_2026: dict[str, Case] = {
    "valid": Case(keep, YES),
    "by columns": Case(do.layout(sparse.csc_matrix), YES),
    "dense": Case(do.layout(np.asarray), YES),
    **{f"numbers as {name}": Case(do.cast(name), YES) for name in ("float64", "int32", "int64", "uint8", "uint16")},
    "dense int32": Case(do.both(do.cast("int32"), do.layout(np.asarray)), YES),
    "column indices not in order": Case(do.unsorted, YES),
    "more annotations": Case(do.ballast, YES),
    "cells in another order": Case(do.take(lambda n: np.random.default_rng(0).permutation(n)), YES),
    "cells of one name": Case(do.repeated_names, YES),
    "an unused category": Case(do.unused_category, YES),
    # genes
    "genes in another order": Case(do.genes_of_cells(lambda n: np.arange(n)[::-1]), YES),
    "dense, genes in another order": Case(
        do.both(do.genes_of_cells(lambda n: np.roll(np.arange(n), 3)), do.layout(np.asarray)), YES
    ),
    "a gene missing": Case(do.genes_of_cells(lambda n: np.arange(n - 1)), NO),
    "a gene more": Case(do.one_gene_more, NO),
    "a gene misspelt": Case(do.gene_name("g4"), NO),
    "a gene twice": Case(do.gene_name("G5"), NO),
    "gene list of another length": Case(do.limit(num_genes=21), YES, "gene-count"),
    "gene list without header": Case(do.genes_list(*do.GENES), YES, "gene-list-header"),
    "gene list with a gene twice": Case(do.genes_list("gene_name", *do.GENES, "G3"), NO),
    "gene list with a gene less": Case(do.genes_list("gene_name", *do.GENES[:-1]), NO),
    "empty gene list": Case(do.genes_list(), NO),
    # contexts
    "contexts of the final phase": Case(
        do.both(
            do.rename("A", "D", column="context"),
            do.rename("B", "E", column="context"),
            do.rename("C", "F", column="context"),
            do.attribute("contexts", "D,E,F"),
        ),
        YES,
    ),
    "no context column": Case(do.column_gone("context"), NO),
    "a context missing": Case(do.drop(lambda draft: np.asarray(draft.cells.obs["context"] == "C")), NO),
    "contexts of two phases": Case(do.rename("C", "D", column="context"), NO),
    "a context more": Case(do.label("D", column="context"), NO),
    "a context in lower case": Case(do.rename("C", "c", column="context"), NO),
    "a cell without context": Case(do.label(None, column="context"), NO),
    # labels and cells of each
    "no target column": Case(do.column_gone("target_gene"), NO),
    "a control cell": Case(do.label(do.CONTROL), NO),
    "a control cell beside all others": Case(
        do.both(do.take(lambda n: np.r_[np.arange(n), 0]), do.label(do.CONTROL, row=-1)), NO
    ),
    "a cell without label": Case(do.label(None), NO),
    "an empty label": Case(do.label(""), NO),
    "a label with a space": Case(do.label("G1 "), NO),
    "a guide instead of its gene": Case(do.rename("G1", "G1-1"), NO),
    "a target in lower case": Case(do.rename("G1", "g1"), NO),
    "a target that is not asked for": Case(do.rename("G1", "G9"), NO),
    "a target missing": Case(do.drop(do.is_target("G2")), NO),
    "a target missing in one context": Case(do.drop(do.is_in("B", "G2")), NO),
    "a cell too few": Case(do.one_cell_less, NO),
    "a cell too many": Case(do.take(lambda n: np.r_[np.arange(n), 3]), NO),
    "no cells": Case(do.take(lambda n: []), NO),
    # the target list
    "target list with cells": Case(do.targets_list("target_gene,n_cells", *(f"{t},4" for t in do.TARGETS)), YES),
    "target list with other cells": Case(
        do.both(
            do.targets_list("target_gene,n_cells", *(f"{t},5" for t in do.TARGETS)),
            do.take(lambda n: np.r_[np.arange(n), np.arange(0, n, 4)]),
        ),
        YES,
        "list-cells",
    ),
    "target list with a target twice": Case(do.targets_list("target_gene", *do.TARGETS, "G1"), YES, "list-labels"),
    "target list with a space": Case(do.targets_list("target_gene", "G1 ", "G2", "G3"), YES, "list-labels"),
    "target list with controls": Case(do.targets_list("target_gene", do.CONTROL, *do.TARGETS), YES, "list-labels"),
    "target list by context": Case(
        do.targets_list("target_gene,context", *(f"{t},{c}" for c in "ABC" for t in do.TARGETS)), YES, "list-labels"
    ),
    "target list with an empty line": Case(do.targets_list("target_gene", "G1", "", "G2", "G3"), YES),
    "target list in another order": Case(do.targets_list("target_gene", "G3", "G1", "G2"), YES),
    "target list without its column": Case(do.targets_list("gene", *do.TARGETS), NO),
    "target list without targets": Case(do.targets_list("target_gene"), NO),
    "target list of another length than the season's": Case(do.limit(num_targets=4), YES),
    "no target list": Case(do.attribute("listed", False), YES),
    "no target list, a cell too few": Case(do.both(do.attribute("listed", False), do.one_cell_less), YES, "unlisted"),
    "no target list, another number": Case(
        do.both(do.attribute("listed", False), do.limit(num_targets=4)), YES, "unlisted"
    ),
    "no target list, a control under another name": Case(
        do.both(do.attribute("listed", False), do.rename("G1", "control")), YES, "control-alike"
    ),
    # caps
    "as many cells as may be": Case(do.limit(max_cells=36), YES),
    "a cell more than may be": Case(do.limit(max_cells=35), NO),
    "as many stored values as may be": Case(do.stored(0), YES),
    "a stored value more than may be": Case(do.stored(-1), NO),
    "an explicit zero more than may be": Case(do.both(do.stored(-1), do.explicit_zero), NO),
    "dense, as many values above 0 as may be": Case(do.both(do.stored(0), do.layout(np.asarray)), YES),
    "dense, a value above 0 more than may be": Case(do.both(do.stored(-1), do.layout(np.asarray)), NO),
    "as large a cell as may be": Case(do.cell_sum(0), YES),
    "a count more than a cell may have": Case(do.cell_sum(1), NO),
    # values
    "NaN": Case(do.value(np.nan), NO),
    "dense with NaN": Case(do.both(do.value(np.nan), do.layout(np.asarray)), NO),
    "infinite": Case(do.value(np.inf), NO),
    "minus infinite": Case(do.value(-np.inf), NO),
    "a negative count": Case(do.value(-1), NO),
    "a negative fraction": Case(do.value(-0.5), NO),
    "minus zero": Case(do.put("X/data", 1, -0.0), YES),
    "half a count": Case(do.value(2.5), NO),
    "a fraction of 1e-4": Case(do.value(2 + 1e-4), NO),
    "a fraction of 1e-7": Case(do.value(2 + 1e-7, dtype="float64"), YES, "near-whole"),
    "log1p": Case(do.logged, NO),
    "an explicit zero": Case(do.explicit_zero, YES),
    "a cell of zeros": Case(do.rows(lambda draft: [3]), YES),
    "a target of zeros": Case(do.rows(do.is_target("G2")), NO),
    "a target of zeros in one context": Case(do.rows(do.is_in("B", "G2")), YES),
    "zeros alone": Case(do.rows(lambda draft: slice(None)), NO),
    # the file
    "a gene twice in a cell": Case(do.twice_in_a_row("X/indices"), YES, "duplicates"),
    "entries beyond the last cell": Case(do.slack, YES, "slack"),
    "row pointers that fall": Case(do.put("X/indptr", 2, 3), NO),
    "row pointers beyond the end": Case(do.put("X/indptr", -1, 10**6), NO),
    "row pointers that do not start at 0": Case(do.put("X/indptr", 0, 1), NO),
    "a column index out of range": Case(do.put("X/indices", 5, 20), NO),
    "a negative column index": Case(do.put("X/indices", 5, -1), NO),
    "cut in half": Case(do.attribute("last", do.cut), NO),
    "no HDF5": Case(do.attribute("last", do.no_hdf5), NO),
}

CASES_2025: dict[str, Case] = {
    "valid": Case(keep, YES),
    "by columns": Case(do.layout(sparse.csc_matrix), YES),
    "dense": Case(do.layout(np.asarray), YES),
    "log1p as float64": Case(do.cast("float64"), YES),
    "dense log1p as float64": Case(do.both(do.cast("float64"), do.layout(np.asarray)), YES),
    "counts": Case(do.counts, YES),
    "counts, dense": Case(do.both(do.counts, do.layout(np.asarray)), YES),
    **{f"counts as {name}": Case(do.both(do.counts, do.cast(name)), YES) for name in ("int32", "int64", "uint16")},
    "column indices not in order": Case(do.unsorted, YES),
    "more annotations": Case(do.ballast, YES),
    "cells in another order": Case(do.take(lambda n: np.random.default_rng(0).permutation(n)), YES),
    "cells of one name": Case(do.repeated_names, YES),
    "an unused category": Case(do.unused_category, YES),
    # genes
    "genes in another order": Case(do.genes_of_cells(lambda n: np.arange(n)[::-1]), YES),
    "a gene missing": Case(do.genes_of_cells(lambda n: np.arange(n - 1)), NO),
    "a gene more": Case(do.one_gene_more, NO),
    "a gene misspelt": Case(do.gene_name("g4"), NO),
    "a gene twice": Case(do.gene_name("G5"), NO),
    "gene list of another length": Case(do.limit(num_genes=21), YES, "gene-count"),
    "gene list with a header": Case(do.genes_list("gene_name", *do.GENES), NO),
    "gene list with a gene less": Case(do.genes_list(*do.GENES[:-1]), NO),
    "empty gene list": Case(do.genes_list(), NO),
    # labels
    "no target column": Case(do.column_gone("target_gene"), NO),
    "no control cells": Case(do.drop(do.is_target(do.CONTROL)), NO),
    "control label in capitals": Case(do.rename(do.CONTROL, "Non-Targeting"), NO),
    "control label with an underscore": Case(do.rename(do.CONTROL, "non_targeting"), NO),
    "a control cell under another name": Case(do.label("ctrl"), YES, "control-alike"),
    "a cell without label": Case(do.label(None), YES, "empty-labels"),
    "an empty label": Case(do.label(""), YES, "empty-labels"),
    "a label with a space": Case(do.label("G1 ", row=14), YES, "empty-labels"),
    "a target in lower case": Case(do.rename("G1", "g1"), YES, "targets"),
    "an invented target": Case(do.rename("G1", "NEWGENE"), YES, "targets"),
    "a target missing": Case(do.drop(do.is_target("G2")), YES, "targets"),
    "a cell too few": Case(do.take(lambda n: np.arange(n - 1)), YES, "cells-per-target"),
    "a cell too many": Case(do.take(lambda n: np.r_[np.arange(n), n - 1]), YES, "cells-per-target"),
    "no cells": Case(do.take(lambda n: []), NO),
    # caps
    "as many cells as may be": Case(do.limit(max_cells=48), YES),
    "a cell more than may be": Case(do.limit(max_cells=47), NO),
    # values
    "just below the limit of log1p": Case(do.value(14.99), YES),
    "at the limit of log1p": Case(do.value(15.0), NO),
    "above the limit of log1p": Case(do.value(15.5), NO),
    "normalised without log1p": Case(lambda draft: setattr(draft, "dense", np.expm1(draft.dense)), NO),
    "NaN": Case(do.value(np.nan), YES, "not-finite"),
    "NaN in counts": Case(do.both(do.counts, do.value(np.nan)), NO),
    "dense with NaN": Case(do.both(do.value(np.nan), do.layout(np.asarray)), YES, "not-finite"),
    "infinite": Case(do.value(np.inf), NO),
    "infinite in counts": Case(do.both(do.counts, do.value(np.inf)), NO),
    "a count that float32 cannot hold": Case(do.both(do.counts, do.value(1e300, dtype="float64")), NO),
    "a negative value": Case(do.value(-0.5), NO),
    "a negative count": Case(do.both(do.counts, do.value(-1)), YES, "negative-counts"),
    "counts in some cells": Case(do.some_counts, YES, "two-scales"),
    "fractions just above 0.001": Case(do.both(do.scaled(9e-4), do.value(1.1e-3)), YES),
    "fractions of at most 0.001": Case(do.both(do.scaled(9e-4), do.value(1e-3)), YES, "faint-fractions"),
    "counts with faint fractions": Case(do.both(do.counts, do.value(3.0009)), YES, "faint-fractions"),
    "an explicit zero": Case(do.explicit_zero, YES),
    "a cell of zeros": Case(do.rows(lambda draft: [3]), YES),
    "a target of zeros": Case(do.rows(do.is_target("G2")), YES),
    "zeros alone": Case(do.rows(lambda draft: slice(None)), YES, "zeros-alone"),
    # the file
    "a gene twice in a cell": Case(do.twice_in_a_row("X/indices"), YES, "duplicates"),
    "entries beyond the last cell": Case(do.slack, YES, "slack"),
    "row pointers that fall": Case(do.put("X/indptr", 2, 3), NO),
    "row pointers beyond the end": Case(do.put("X/indptr", -1, 10**6), NO),
    "row pointers that do not start at 0": Case(do.put("X/indptr", 0, 1), NO),
    "a column index out of range": Case(do.put("X/indices", 5, 20), YES, "structure"),
    "cut in half": Case(do.attribute("last", do.cut), NO),
    "no HDF5": Case(do.attribute("last", do.no_hdf5), NO),
}

SEASONS = {"vcc2025": CASES_2025, "vcc2026": CASES_2026}
ALL = [(season, name) for season, cases in SEASONS.items() for name in cases]


def stricter_rules() -> dict[str, str]:
    """Return the season of each rule in the table of docs/strictness.md, by its key."""
    lines = STRICTNESS.read_text(encoding="utf-8").splitlines()
    found = (re.match(r"\| `([a-z0-9-]+)` \| ([^|]+) \|", line) for line in lines)
    return {match[1]: match[2].strip() for match in found if match}


def draft_of(season: str, name: str) -> Draft:
    draft = do.DRAFTS[season]()
    SEASONS[season][name].change(draft)
    return draft


def pack_ours(season: str, draft: Draft, folder: Path) -> Path:
    return pack(
        folder / "p.h5ad",
        folder / "ours.vcc",
        season=season_of(season, draft.limits | ({"contexts": draft.contexts} if season == "vcc2026" else {})),
        genes=folder / "genes.csv",
        targets=folder / "targets.csv" if draft.listed else None,
    )


@pytest.mark.parametrize(("season", "name"), ALL)
def test_ours_agrees_or_is_stricter_by_name(season: str, name: str, tmp_path: Path) -> None:
    case, draft, folder = SEASONS[season][name], draft_of(season, name), tmp_path / "case"
    draft.write(folder)
    reason = None
    try:
        pack_ours(season, draft, folder)
    except PertcastError as error:
        reason = error
        assert not (folder / "ours.vcc").exists()
    expected = NO if case.stricter else case.official
    assert (NO if reason else YES) == expected, reason
    if reason is None and not draft.raw:
        assert_packed_as_drafted(folder, draft, normalised="counts" in name)


def assert_packed_as_drafted(folder: Path, draft: Draft, *, normalised: bool) -> None:
    """Compare what the archive holds with what was written, in the order of the list."""
    packed = ad.read_h5ad(unpack(folder / "ours.vcc", folder / "back.h5ad"))
    assert packed.var_names.tolist() == list(do.GENES)
    assert packed.obs["target_gene"].tolist() == draft.cells.obs["target_gene"].tolist()
    if not normalised:
        wanted = draft.cells[:, list(do.GENES)].to_df().to_numpy(np.float32)
        assert np.array_equal(packed.X.toarray(), wanted)


def test_there_are_enough_cases_and_both_verdicts() -> None:
    for cases in SEASONS.values():
        assert len(cases) >= 60
        assert sum(case.official == YES for case in cases.values()) >= 20
        assert sum(case.official == NO for case in cases.values()) >= 20


def test_the_document_lists_just_the_rules_that_the_cases_show() -> None:
    shown: dict[str, set[str]] = {}
    for season, name in ALL:
        case = SEASONS[season][name]
        if case.stricter:
            assert case.official == YES, f"{name}: the official packer refuses it too, so ours is not stricter"
            shown.setdefault(case.stricter, set()).add(season.removeprefix("vcc"))
    assert {key: ", ".join(sorted(seasons)) for key, seasons in shown.items()} == stricter_rules()


def official_python(tool: str) -> str:
    """Return the Python that has an official tool; skips where there is none."""
    program = os.environ.get(f"PERTCAST_{tool.upper()}")
    if program:
        return str(Path(program).with_name("python"))
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"needs {tool}, installed here or in the environment that PERTCAST_{tool.upper()} names")
    return sys.executable


def ask(python: str, what: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what an official tool says of each case."""
    script = Path(__file__).parents[2] / "agreement_official.py"
    done = subprocess.run([python, str(script), what], input=json.dumps(cases), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@pytest.mark.parametrize(("season", "tool"), [("vcc2025", "cell_eval"), ("vcc2026", "vcc")])
def test_the_record_is_what_the_official_packer_says_and_packs(season: str, tool: str, tmp_path: Path) -> None:
    python = official_python(tool)
    drafts = {name: draft_of(season, name) for name in SEASONS[season]}
    folders = {name: tmp_path / str(number) for number, name in enumerate(drafts)}
    for name, draft in drafts.items():
        draft.write(folders[name])
    asked = {
        name: {
            "input": str(folders[name] / "p.h5ad"),
            "genes": str(folders[name] / "genes.csv"),
            "targets": str(folders[name] / "targets.csv") if draft.listed else None,
            "output": str(folders[name] / "theirs.vcc"),
            "contexts": draft.contexts,
            "limits": draft.limits,
        }
        for name, draft in drafts.items()
    }
    said = ask(python, tool, asked)
    record = {name: case.official for name, case in SEASONS[season].items()}
    wrong = {name: said[name] for name in record if said[name].partition(":")[0] != record[name]}
    assert not wrong
    agreed = [name for name, case in SEASONS[season].items() if case.official == YES and case.stricter is None]
    ours = {name: pack_ours(season, drafts[name], folders[name]) for name in agreed}
    for name in agreed:
        assert_packed_alike(ours[name], folders[name])
    if tool == "vcc":
        assert_read_alike(python, ours)


def assert_read_alike(python: str, ours: dict[str, Path]) -> None:
    """Have the official reader of archives read ours and theirs, and compare what it takes from them."""
    mine, theirs = (
        ask(python, "read_vcc", {name: {"archive": str(vcc.with_name(file))} for name, vcc in ours.items()})
        for file in ("ours.vcc", "theirs.vcc")
    )
    for name in ours:
        assert mine[name]["contexts"] == theirs[name]["contexts"]
        meta, official = mine[name]["meta"], theirs[name]["meta"]
        assert meta.pop("packer").startswith("pertcast ")
        official.pop("cli_version")
        assert mine[name]["nnz"] == meta["nnz"]
        if "zero" in name:
            # ours does not store explicit zeros where it writes the matrix anew
            assert meta.pop("nnz") <= official.pop("nnz")
        assert meta == official


def assert_packed_alike(ours: Path, folder: Path) -> None:
    """Compare what both archives hold, value for value."""
    mine, theirs = (ad.read_h5ad(unpack(vcc, vcc.with_suffix(".h5ad"))) for vcc in (ours, folder / "theirs.vcc"))
    assert mine.var_names.tolist() == theirs.var_names.tolist()
    pd.testing.assert_frame_equal(mine.obs.astype(str), theirs.obs.astype(str))
    assert mine.X.dtype == theirs.X.dtype == np.float32
    # log1p may differ in its last bit between builds of NumPy
    np.testing.assert_allclose(mine.X.toarray(), theirs.X.toarray(), rtol=3e-7, atol=0)
