"""A valid prediction passes; any single corruption is reported, with its place and what to do."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from conftest import SMALL_GENES, write_small_h5ad
from pertcast.errors import ConfigError, DataError
from pertcast.seasons import SEASONS
from pertcast.submission.check import CheckReport, check
from pertcast.submission.check.labels import Groups
from pertcast.submission.check.targets import check_targets, check_totals, check_zero_targets

RULES = {"num_genes": 20, "num_targets": 3, "max_cells": 100}
Mutator = Callable[[ad.AnnData, np.random.Generator], ad.AnnData | None]


def write_lists(folder: Path, *, cells: int = 24) -> tuple[Path, Path]:
    genes, targets = folder / "gene_names.csv", folder / "pert_counts.csv"
    genes.write_text("".join(f"{gene}\n" for gene in SMALL_GENES))
    targets.write_text("target_gene,n_cells\n" + "".join(f"G{number},{cells}\n" for number in (1, 2, 3)))
    return genes, targets


def examine(path: Path, *, cells: int = 24, rules: dict[str, Any] | None = None, listed: bool = True) -> CheckReport:
    genes, targets = write_lists(path.parent, cells=cells)
    targets_or_none = targets if listed else None
    return check(path, season="vcc2025", genes=genes, targets=targets_or_none, rules={**RULES, **(rules or {})})


def edit(path: Path, change: Callable[[ad.AnnData], ad.AnnData | None]) -> Path:
    cells = ad.read_h5ad(path)
    changed = change(cells)
    (cells if changed is None else changed).write_h5ad(path)
    return path


def messages(report: CheckReport) -> str:
    return "\n".join(str(problem) for problem in report.problems)


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("scale", ["counts", "log1p"])
def test_a_valid_prediction(tmp_path: Path, layout: str, scale: str) -> None:
    report = examine(write_small_h5ad(tmp_path / "p.h5ad", layout=layout, scale=scale))
    assert report.problems == ()
    assert report.ok
    assert [item.ok for item in report.checklist] == [True] * 5
    assert [item.evidence for item in report.checklist][:2] == [
        "20 genes in the order of gene_names.csv",
        "24 'non-targeting' cells",
    ]
    assert report.checklist[3] == ("at most 100 cells", True, "96 cells")
    assert report.checklist[4].evidence == "3 targets, 72 cells, each as in pert_counts.csv"
    facts = {"cells": 96, "genes": 20, "controls": 24, "targets": 3, "scale": scale, "zero_cells": 0}
    assert facts.items() <= report.facts.items()
    assert [note.split(":")[0] for note in report.notes] == [f"rule {rule} overridden" for rule in RULES]


def test_the_facts_are_those_of_the_matrix(tmp_path: Path) -> None:
    path = write_small_h5ad(tmp_path / "p.h5ad")
    counts = ad.read_h5ad(path).X.toarray()
    facts = examine(path).facts
    assert facts["max_value"] == counts.max()
    assert facts["max_cell_sum"] == counts.sum(1).max()
    assert facts["median_cell_sum"] == np.median(counts.sum(1))
    assert facts["stored_values"] == np.count_nonzero(counts)


@pytest.mark.parametrize("scale", ["counts", "log1p"])
@pytest.mark.parametrize(("factor", "noted"), [(1.0, False), (1.4, False), (3.0, True), (0.3, True)])
def test_targets_and_controls_of_different_totals_are_noted(
    tmp_path: Path, scale: str, factor: float, noted: bool
) -> None:
    path = write_small_h5ad(tmp_path / "p.h5ad")
    cells = ad.read_h5ad(path)
    is_control = (cells.obs["target_gene"] == "non-targeting").to_numpy()
    values = cells.X.toarray().astype(np.float64)
    values *= 1000 / values.sum(1, keepdims=True)
    values[~is_control] *= factor
    cells.X = sparse.csr_matrix((np.log1p(values) if scale == "log1p" else np.rint(values)).astype(np.float32))
    cells.write_h5ad(path)
    report = examine(path)
    assert report.ok
    assert any("control cells 1,000" in note or "different totals" in note for note in report.notes) == noted
    assert report.facts["median_total_targets"] == pytest.approx(1000 * factor, rel=0.02)
    assert report.facts["median_total_controls"] == pytest.approx(1000, rel=0.02)


def test_the_report_is_json(tmp_path: Path) -> None:
    report = examine(write_small_h5ad(tmp_path / "p.h5ad"), cells=23)
    back = json.loads(json.dumps(report.as_json()))
    assert back["ok"] is False
    assert back["problems"][0].keys() == {"place", "message", "remedy"}
    assert back["checklist"][4]["ok"] is False


def test_without_a_target_list_it_is_not_asked(tmp_path: Path) -> None:
    report = examine(write_small_h5ad(tmp_path / "p.h5ad"), listed=False)
    assert report.ok
    assert report.checklist[4] == ("target list", None, "not asked: no target list given")


def test_misspelt_symbols_without_a_target_list(tmp_path: Path) -> None:
    path = write_small_h5ad(tmp_path / "p.h5ad", perts=("non-targeting", "g1", "Q7"))
    report = examine(path, listed=False)
    assert [problem.remedy for problem in report.problems] == ["did you mean 'G1'?"]
    assert any("'Q7'" in note for note in report.notes)


def test_scaled_cells_are_right_for_the_controls_there_are(tmp_path: Path) -> None:
    path = write_small_h5ad(tmp_path / "p.h5ad")
    # 24 controls under a cap of 97 leave 73 cells for 3 x 30: floor(30 * 73 / 90) = 24.
    assert examine(path, cells=30, rules={"max_cells": 97}).ok
    report = examine(path, cells=30, rules={"max_cells": 100})
    assert "scaled by 0.8444 (for 24 controls under the cap): G1: expected 25, got 24" in messages(report)


def drop_gene(cells: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
    gene = int(rng.integers(cells.n_vars))
    return cells[:, [i for i in range(cells.n_vars) if i != gene]].copy()


def swap_genes(cells: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
    order = np.arange(cells.n_vars)
    i, j = rng.choice(cells.n_vars, 2, replace=False)
    order[[i, j]] = order[[j, i]]
    return cells[:, order].copy()


def rename_gene(cells: ad.AnnData, rng: np.random.Generator) -> None:
    names = cells.var_names.tolist()
    names[int(rng.integers(len(names)))] = "g7x"
    cells.var_names = names


def add_gene(cells: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
    more = ad.AnnData(
        sparse.csr_matrix(np.ones((cells.n_obs, 1), np.float32)), obs=cells.obs, var=pd.DataFrame(index=["X"])
    )
    return ad.concat([cells, more], axis=1, merge="same")


def relabel(old: str, new: str) -> Mutator:
    def change(cells: ad.AnnData, rng: np.random.Generator) -> None:
        cells.obs["target_gene"] = cells.obs["target_gene"].astype(str).replace(old, new).astype("category")

    return change


def relabel_one(new: str | None) -> Mutator:
    def change(cells: ad.AnnData, rng: np.random.Generator) -> None:
        labels = cells.obs["target_gene"].astype(object).to_numpy()
        labels[int(rng.integers(cells.n_obs))] = new
        cells.obs["target_gene"] = pd.Categorical(labels)

    return change


def rename_column(cells: ad.AnnData, rng: np.random.Generator) -> None:
    cells.obs = cells.obs.rename(columns={"target_gene": str(rng.choice(["gene", "Target_Gene", "pert", "x"]))})


def change_value(value: float) -> Mutator:
    def change(cells: ad.AnnData, rng: np.random.Generator) -> None:
        cells.X.data[int(rng.integers(cells.X.nnz))] = value

    return change


def cast(dtype: str) -> Mutator:
    def change(cells: ad.AnnData, rng: np.random.Generator) -> None:
        cells.X = cells.X.astype(dtype)

    return change


def whole_cells(cells: ad.AnnData, rng: np.random.Generator) -> None:
    dense = cells.X.toarray()
    some = rng.choice(cells.n_obs, int(rng.integers(1, 20)), replace=False)
    dense[some] = np.rint(np.expm1(dense[some]))
    cells.X = sparse.csr_matrix(dense)


def unlog(cells: ad.AnnData, rng: np.random.Generator) -> None:
    cells.X.data = np.expm1(cells.X.data)


def drop_cells(cells: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
    targets = np.flatnonzero(cells.obs["target_gene"] != "non-targeting")
    gone = rng.choice(targets, int(rng.integers(1, 10)), replace=False)
    return cells[np.setdiff1d(np.arange(cells.n_obs), gone)].copy()


def drop_label(label: str) -> Mutator:
    return lambda cells, rng: cells[cells.obs["target_gene"] != label].copy()


def too_many(cells: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
    controls = cells[cells.obs["target_gene"] == "non-targeting"]
    return ad.concat([cells, controls], index_unique="-")


def all_zero(cells: ad.AnnData, rng: np.random.Generator) -> None:
    cells.X = sparse.csr_matrix(cells.shape, dtype=np.float32)


MUTATORS: dict[str, tuple[Mutator, str]] = {
    "a gene is missing": (drop_gene, "1 gene of gene_names.csv missing: 'G"),
    "a gene is misspelt": (rename_gene, "1 gene not in gene_names.csv: 'g7x'"),
    "a gene too many": (add_gene, "expected 20 genes, got 21"),
    "control label with underscore": (relabel("non-targeting", "non_targeting"), "there is 'non_targeting'"),
    "control label in capitals": (relabel("non-targeting", "Non-Targeting"), "there is 'Non-Targeting'"),
    "control label of another field": (relabel("non-targeting", "control"), "there is 'control'"),
    "one control under another label": (relabel_one("ctrl"), "more than one label: 'non-targeting', 'ctrl'"),
    "no controls": (drop_label("non-targeting"), "expected at least one cell labelled 'non-targeting', got none"),
    "target in lower case": (relabel("G1", "g1"), "did you mean 'G1'?"),
    "an invented target": (relabel_one("NEWGENE"), "'NEWGENE' is no target of pert_counts.csv, nor a gene"),
    "a target that was not asked for": (relabel_one("G9"), "'G9' is no target of pert_counts.csv;"),
    "a target is missing": (drop_label("G2"), "no cell for 1 of 3 targets of pert_counts.csv: 'G2'"),
    "an empty label": (relabel_one(""), "no label in 1 cell"),
    "a blank label": (relabel_one("  "), "no label in 1 cell"),
    "a missing label": (relabel_one(None), "no label in 1 cell"),
    "a label with a space": (relabel_one("G1 "), "labels have spaces around them: 'G1 '"),
    "the column has another name": (rename_column, "expected a column 'target_gene', got"),
    "NaN": (change_value(np.nan), "1 NaN value, the first nan"),
    "infinity": (change_value(np.inf), "1 infinite value, the first inf"),
    "minus infinity": (change_value(-np.inf), "1 infinite value, the first -inf"),
    "a negative value": (change_value(-0.5), "1 negative value, the first -0.5"),
    "a value above any log1p": (change_value(17.5), "of 15 or more that are no counts in 1 cell (row"),
    "counts in some cells": (whole_cells, "two scales"),
    "normalised without log1p": (unlog, "take log1p of the normalised values"),
    "cells are missing": (drop_cells, "with other cells than pert_counts.csv"),
    "too many cells": (too_many, "expected at most 100 cells, controls included, got 120"),
    "nothing but zeros": (all_zero, "no value is above 0 in any cell"),
}


@pytest.mark.parametrize("name", MUTATORS)
def test_any_single_corruption_is_named(tmp_path: Path, name: str) -> None:
    mutate, expected = MUTATORS[name]
    path = write_small_h5ad(tmp_path / "p.h5ad", scale="log1p")
    report = examine(edit(path, lambda cells: mutate(cells, np.random.default_rng(5))))
    assert expected in messages(report)
    assert all(problem.place.startswith(str(path)) for problem in report.problems)
    assert all(problem.remedy for problem in report.problems)
    assert False in [item.ok for item in report.checklist]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(MUTATORS)), st.integers(0, 2**32 - 1))
def test_any_single_corruption_is_reported_wherever_it_is(name: str, seed: int) -> None:
    mutate, _ = MUTATORS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = write_small_h5ad(Path(folder) / "p.h5ad", scale="log1p", seed=seed % 7)
        report = examine(edit(path, lambda cells: mutate(cells, np.random.default_rng(seed))))
    assert not report.ok


def test_all_problems_at_once(tmp_path: Path) -> None:
    def change(cells: ad.AnnData) -> ad.AnnData:
        cells.X.data[3] = np.nan
        cells.X.data[30] = -1
        relabel("G1", "g1")(cells, np.random.default_rng(0))
        relabel("non-targeting", "control")(cells, np.random.default_rng(0))
        return drop_gene(cells, np.random.default_rng(0))

    text = messages(
        examine(edit(write_small_h5ad(tmp_path / "p.h5ad", scale="log1p"), change), rules={"max_cells": 90})
    )
    for part in ("NaN", "negative", "'g1'", "'control'", "missing: 'G", "at most 90 cells"):
        assert part in text


def test_bad_values_have_a_cell_and_a_gene(tmp_path: Path) -> None:
    def change(cells: ad.AnnData) -> None:
        dense = cells.X.toarray()
        dense[40, 7] = dense[41, 0] = np.nan
        cells.X = sparse.csr_matrix(dense)

    report = examine(edit(write_small_h5ad(tmp_path / "p.h5ad", scale="log1p"), change))
    assert [str(problem.place).rpartition("X, ")[2] for problem in report.problems] == ["row 40, gene 'G7'"]
    assert "2 NaN values, the first nan" in messages(report)


def test_the_fewer_cells_break_the_scale_and_are_named(tmp_path: Path) -> None:
    def change(cells: ad.AnnData) -> None:
        dense = cells.X.toarray()
        dense[[3, 50]] = np.rint(np.expm1(dense[[3, 50]]))
        cells.X = sparse.csr_matrix(dense)

    path = edit(write_small_h5ad(tmp_path / "p.h5ad", scale="log1p"), change)
    report = examine(path)
    assert "whole counts in 2 cells, log1p in 94; whole counts in rows 3, 50" in messages(report)
    assert report.facts["scale"] == "mixed"


def test_another_order_of_genes_is_a_note(tmp_path: Path) -> None:
    path = write_small_h5ad(tmp_path / "p.h5ad", scale="log1p")
    report = examine(edit(path, lambda cells: swap_genes(cells, np.random.default_rng(5))))
    assert report.ok
    assert any("in another order than in gene_names.csv from position" in note for note in report.notes)


def test_cells_of_zeros_are_a_note(tmp_path: Path) -> None:
    def change(cells: ad.AnnData) -> None:
        dense = cells.X.toarray()
        dense[[0, 95]] = 0
        cells.X = sparse.csr_matrix(dense)

    report = examine(edit(write_small_h5ad(tmp_path / "p.h5ad", scale="log1p"), change))
    assert report.ok
    assert "no value above 0 in 2 cells (rows 0, 95)" in report.notes
    assert report.facts["zero_cells"] == 2


def spoil(path: Path, change: Callable[[Any], None]) -> Path:
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def put(name: str, index: int, value: int) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        file[name][index] = value

    return change


def drop(name: str) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file[name]

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("X/indices", 5, 20),
        put("X/indices", 5, -1),
        put("X/indptr", 4, 10**6),
        put("X/indptr", -1, 3),
        put("obs/target_gene/codes", 3, 99),
        drop("X/data"),
        drop("X"),
        drop("var"),
        drop("obs/target_gene/categories"),
    ],
)
def test_broken_structure_is_a_problem_and_no_crash(tmp_path: Path, change: Callable[[Any], None]) -> None:
    report = examine(spoil(write_small_h5ad(tmp_path / "p.h5ad", scale="log1p"), change))
    assert not report.ok
    assert all(str(tmp_path / "p.h5ad") in problem.place for problem in report.problems)


def test_files_that_are_no_h5ad_are_one_problem(tmp_path: Path) -> None:
    whole = write_small_h5ad(tmp_path / "p.h5ad").read_bytes()
    for name, content in {"cut.h5ad": whole[: len(whole) // 2], "text.h5ad": b"hello", "empty.h5ad": b""}.items():
        (tmp_path / name).write_bytes(content)
        assert len(examine(tmp_path / name).problems) == 1
    assert "no such file" in messages(examine(tmp_path / "nowhere.h5ad"))
    assert "folder" in messages(examine(tmp_path))


def test_no_cells(tmp_path: Path) -> None:
    path = edit(write_small_h5ad(tmp_path / "p.h5ad"), lambda cells: cells[:0].copy())
    assert "there are no cells" in messages(examine(path))


def test_wrong_lists_and_seasons_are_errors(tmp_path: Path) -> None:
    path = write_small_h5ad(tmp_path / "p.h5ad")
    genes, _ = write_lists(tmp_path)
    with pytest.raises(DataError, match="expected 18,080 genes"):
        check(path, season="vcc2025", genes=genes)
    with pytest.raises(ConfigError, match="vcc2031"):
        check(path, season="vcc2031", genes=genes)
    with pytest.raises(ConfigError, match="no such rule"):
        check(path, season="vcc2025", genes=genes, rules={"num_gene": 20})


RULES_2026 = {"num_genes": 20, "num_targets": 3, "cells_per_target": 8, "max_cells": 100, "max_cell_sum": 2000}


def examine_2026(path: Path, **rules: int) -> CheckReport:
    genes, targets = path.parent / "genes.csv", path.parent / "targets.csv"
    genes.write_text("gene_name\n" + "".join(f"{gene}\n" for gene in SMALL_GENES))
    targets.write_text("target_gene\nG1\nG2\nG3\n")
    return check(path, season="vcc2026", genes=genes, targets=targets, rules={**RULES_2026, **rules})


def write_2026(
    path: Path, *, scale: str = "counts", contexts: tuple[str, ...] = ("A", "B", "C"), **options: Any
) -> Path:
    perts = options.pop("perts", ("G1", "G2", "G3"))
    write_small_h5ad(path, perts=perts, contexts=contexts, batches=("b",), cells_per_group=8, scale=scale, **options)
    return edit(path, lambda cells: void(cells.obs.insert(0, "context", cells.obs["cell_type"])))


def void(_value: object) -> None:
    return None


def test_season_2026(tmp_path: Path) -> None:
    report = examine_2026(write_2026(tmp_path / "p.h5ad"))
    assert report.problems == ()
    assert [item.ok for item in report.checklist] == [True] * 5
    assert examine_2026(edit(tmp_path / "p.h5ad", lambda cells: cast("int32")(cells, np.random.default_rng(0)))).ok


@pytest.mark.parametrize(
    ("options", "rules", "message"),
    [
        ({"scale": "log1p"}, {}, "expected whole counts, got fractions in 72 cells"),
        ({"contexts": ("A", "B", "D")}, {}, "expected the contexts {A, B, C} or {D, E, F}, never mixed"),
        ({"contexts": ("A", "B")}, {}, "never mixed, got 'A', 'B'"),
        ({"perts": ("G1", "G2", "G3", "non-targeting")}, {}, "takes no control cells, got 'non-targeting'"),
        ({"perts": ("G1", "G2", "G3", "control")}, {}, "takes no control cells, got 'control'"),
        ({}, {"cells_per_target": 9}, "A/G1: expected 9, got 8"),
        ({}, {"max_cell_sum": 10}, "expected at most 10 counts a cell"),
        ({}, {"max_stored_values": 10}, "expected at most 10 stored values"),
        ({}, {"max_cells": 71}, "expected at most 71 cells"),
    ],
)
def test_season_2026_rules(tmp_path: Path, options: dict[str, Any], rules: dict[str, int], message: str) -> None:
    assert message in messages(examine_2026(write_2026(tmp_path / "p.h5ad", **options), **rules))


def test_a_target_lost_in_one_context(tmp_path: Path) -> None:
    def change(cells: ad.AnnData) -> ad.AnnData:
        return cells[~((cells.obs["context"] == "B") & (cells.obs["target_gene"] == "G2"))].copy()

    report = examine_2026(edit(write_2026(tmp_path / "p.h5ad"), change))
    assert "1 target with other cells than targets.csv: B/G2: expected 8, got 0" in messages(report)


def test_the_context_column_is_missing(tmp_path: Path) -> None:
    path = write_small_h5ad(tmp_path / "p.h5ad", perts=("G1", "G2", "G3"), batches=("b",), cells_per_group=8)
    assert "expected a column 'context'" in messages(examine_2026(path))


def groups_of(labels: list[str | None], contexts: list[str] | None = None) -> Groups:
    places = contexts or [""] * len(labels)
    cells = Counter((place, label) for place, label in zip(places, labels, strict=True) if label is not None)
    num_controls = sum(number for (_, label), number in cells.items() if label == "non-targeting")
    return Groups(dict(cells), num_controls, pd.Categorical(labels))


def test_targets_of_zeros_alone_are_named_where_the_season_forbids_them() -> None:
    groups = groups_of(["A", "B", "B", "C", None, "D", "D", "E"])
    season = SEASONS["vcc2026"]

    def found(*rows: int) -> str:
        zeros = np.array(rows, dtype=np.int64)
        return "\n".join(map(str, check_zero_targets(groups, season, zeros, path=Path("p.h5ad")).problems))

    assert found() == ""
    assert found(1) == found(4) == found(5) == ""
    assert "in any cell of 1 target: 'B';" in found(1, 2, 5)
    assert "in any cell of 3 targets: 'A', 'C', 'D';" in found(0, 3, 4, 5, 6)
    free = replace(season, zero_targets="allowed")
    assert check_zero_targets(groups, free, np.array([0]), path=Path("p.h5ad")).problems == ()


def test_totals_are_of_the_controls_wherever_their_label_stands() -> None:
    season = SEASONS["vcc2025"]
    totals = np.array([10.0, 30.0, 100.0, 200.0, np.nan, 1.0])
    both = check_totals(groups_of(["A", "z", "non-targeting", "non-targeting", "z", None]), season, totals)
    assert both.facts == {"median_total_targets": 20.0, "median_total_controls": 150.0}
    assert check_totals(groups_of(["A", "z", "B", "B", "z", None]), season, totals).facts == {}


@pytest.mark.parametrize(
    ("num", "wrong"), [(2, "expected 3 targets, got 2"), (3, ""), (4, "expected 3 targets, got 4")]
)
def test_without_a_list_the_season_knows_how_many_there_are(num: int, wrong: str) -> None:
    season = replace(SEASONS["vcc2026"], num_targets=3, cells_per_target=2)
    genes = tuple(f"G{number:02}" for number in range(num))
    labels = [gene for gene in genes for _ in range(2)] + ["G00"]
    found = check_targets(
        groups_of([*labels], ["A"] * len(labels)), season, path=Path("p"), genes=genes, targets=None, list_name="-"
    )
    text = "\n".join(map(str, found.problems))
    assert "1 target with other cells than season vcc2026: A/G00: expected 2, got 3;" in text
    assert (wrong in text) if wrong else ("targets, got" not in text)


def test_of_many_targets_with_other_cells_ten_are_named() -> None:
    season = replace(SEASONS["vcc2026"], num_targets=12, cells_per_target=2)
    genes = tuple(f"G{number:02}" for number in range(12))
    found = check_targets(
        groups_of([*genes], ["A"] * 12), season, path=Path("p"), genes=genes, targets=None, list_name="-"
    )
    (problem,) = found.problems
    assert "12 targets with other cells" in problem.message
    assert problem.message.endswith("A/G09: expected 2, got 1; and 2 more")


@pytest.mark.parametrize("layout", ["csr", "dense"])
def test_zeros_of_a_dense_matrix_are_not_packed_and_do_not_count(tmp_path: Path, layout: str) -> None:
    path = write_small_h5ad(tmp_path / "p.h5ad", layout=layout)
    nonzero = np.count_nonzero(ad.read_h5ad(write_small_h5ad(tmp_path / "q.h5ad")).X.toarray())
    facts = examine(path).facts
    assert facts["stored_values"] == facts["nonzero_values"] == nonzero


def test_a_stored_zero_is_stored_and_no_value_above_0(tmp_path: Path) -> None:
    def blank(cells: ad.AnnData) -> None:
        cells.X.data[cells.X.indptr[2] : cells.X.indptr[3]] = 0

    path = edit(write_small_h5ad(tmp_path / "p.h5ad"), blank)
    stored = ad.read_h5ad(path).X
    facts = examine(path).facts
    assert facts["zero_cells"] == 1
    assert facts["stored_values"] == stored.nnz
    assert facts["nonzero_values"] == np.count_nonzero(stored.data) < stored.nnz


def test_a_missing_column_says_which_there_are(tmp_path: Path) -> None:
    def keep_none(cells: ad.AnnData) -> None:
        cells.obs = cells.obs[[]]

    def rename(cells: ad.AnnData) -> None:
        cells.obs = cells.obs.rename(columns={"target_gene": "target"})

    assert "got no columns" in messages(examine(edit(write_small_h5ad(tmp_path / "p.h5ad"), keep_none)))
    assert "got 'cell_type', 'target', 'batch'" in messages(
        examine(edit(write_small_h5ad(tmp_path / "q.h5ad"), rename))
    )


def test_an_extra_gene_without_a_likeness_has_no_suggestion(tmp_path: Path) -> None:
    def strange(cells: ad.AnnData) -> None:
        cells.var_names = ["QQQQQQQQ", *cells.var_names[1:]]

    assert "did you mean" not in messages(examine(edit(write_small_h5ad(tmp_path / "p.h5ad"), strange)))
