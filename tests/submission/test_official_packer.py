"""The cross-check: it runs the official packer as a program, and tells any difference from what we packed."""

from __future__ import annotations

import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from pertcast.errors import SubmissionError
from pertcast.pipeline import Outcome, run_experiment
from pertcast.seasons import season
from pertcast.submission.official_packer import CrossCheck, cross_check, find_packer
from pertcast.submission.pack import pack
from workspace import Workspace, make_workspace

RULES = season("vcc2025", {"num_genes": 20, "num_targets": 3, "max_cells": 120})


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("cross") / "w")


@pytest.fixture(scope="module")
def outcome(workspace: Workspace) -> Outcome:
    return run_experiment(workspace.experiment, workspace.out, overrides=["train.steps=2"])


def compare(outcome: Outcome, workspace: Workspace) -> CrossCheck:
    return cross_check(outcome.prediction, outcome.archive, season=RULES, genes=workspace.genes)


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, *, packs: Path | None) -> None:
    """Name a program as cell-eval that packs just this archive, or refuses."""
    program = folder / "cell-eval"
    copy = f"shutil.copy({str(packs)!r}, sys.argv[sys.argv.index('-o') + 1])" if packs else "sys.exit('no such gene')"
    program.write_text(f"#!{sys.executable}\nimport shutil, sys\n{copy}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PERTCAST_CELL_EVAL", str(program))


def test_the_same_archive_is_the_same(
    outcome: Outcome, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, packs=outcome.archive)
    assert compare(outcome, workspace) == CrossCheck("cell-eval prep", 119, 20, 0.0)
    assert not list(outcome.archive.parent.glob(".cross-check-*"))


@pytest.mark.parametrize("kind", ["value", "stored zero", "label", "fewer cells"])
def test_any_difference_is_told(
    kind: str, outcome: Outcome, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = ad.read_h5ad(outcome.prediction)
    words = ""
    if kind == "value":
        cells.X[7, 3] *= np.float32(1.001)
        words = "cell 7, gene G3: the two values differ"
    elif kind == "stored zero":
        row, column = (int(places[0]) for places in cells.X.nonzero())
        cells.X[row, column] = 0
        words = f"cell {row}, gene G{column}"
    elif kind == "label":
        cells.obs["target_gene"] = cells.obs["target_gene"].to_numpy()[::-1]
        words = "target_gene of cell 0"
    else:
        cells = cells[1:].copy()
        words = r"packs \(118, 20\)"
    cells.write_h5ad(tmp_path / "other.h5ad")
    other = pack(tmp_path / "other.h5ad", tmp_path / "other.vcc", season=RULES, genes=workspace.genes)
    stand_in(tmp_path, monkeypatch, packs=other)
    with pytest.raises(SubmissionError, match=words):
        compare(outcome, workspace)
    assert outcome.archive.is_file()


def test_a_refusal_is_told_with_its_reason(
    outcome: Outcome, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, packs=None)
    with pytest.raises(SubmissionError, match="`cell-eval prep` refuses it: no such gene"):
        compare(outcome, workspace)


def test_a_packer_that_is_not_there_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_arguments, **_options: None)
    for name, extra in (("vcc2025", "score"), ("vcc2026", "official")):
        for variable in ("PERTCAST_CELL_EVAL", "PERTCAST_VCC"):
            monkeypatch.delenv(variable, raising=False)
        with pytest.raises(SubmissionError, match=rf"pip install 'pertcast\[{extra}\]'"):
            find_packer(season(name))


def test_the_official_packer_packs_the_same(outcome: Outcome, workspace: Workspace) -> None:
    pytest.importorskip("cell_eval")
    assert compare(outcome, workspace).largest_difference == 0
