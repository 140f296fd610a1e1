"""Parts in any order of the folder assemble to the same bytes; a part that is missing or wrong is named."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from conftest import SMALL_GENES
from pertcast.errors import DataError, SubmissionError
from pertcast.files.artefacts import Manifest, manifest_path, read_manifest, verify_artefact, write_manifest
from pertcast.files.h5ad_writer import CsrWriter
from pertcast.submission.assemble import assemble
from pertcast.submission.check import check

PARTS = (("G3", 4), ("G1", 6), ("non-targeting", 5))


def part_values(target: str, cells: int) -> np.ndarray:
    rng = np.random.default_rng(len(target) + cells)
    values: np.ndarray = np.log1p(rng.poisson(1.5, size=(cells, len(SMALL_GENES))) * 1.7).astype(np.float32)
    return values


def write_part(path: Path, target: str, cells: int, *, batch: bool = True, context: str = "H1", step: int = 2) -> None:
    path.parent.mkdir(exist_ok=True)
    columns = {"target_gene": [target] * cells, "context": [context] * cells}
    if batch:
        columns["batch"] = [f"b{number % 2}" for number in range(cells)]
    with CsrWriter(path, SMALL_GENES) as writer:
        for start in range(0, cells, step):
            writer.append(sparse.csr_matrix(part_values(target, cells)[start : start + step]))
        writer.finish(pd.DataFrame(columns, index=[str(i) for i in range(cells)]).astype("category"))


def write_parts(
    folder: Path, *, order: Sequence[int] = (0, 1, 2), context_column: str | None = None, **options: Any
) -> Path:
    """Write the folder of parts that generation makes; `order` is that of making the files."""
    folder.mkdir()
    for index in order:
        target, cells = PARTS[index]
        write_part(folder / "H1" / f"{target}.h5ad", target, cells, **options)
    (folder / "genes.csv").write_text("".join(f"{gene}\n" for gene in SMALL_GENES))
    plan = {
        "season": "vcc2025",
        "rules": {"num_genes": 20, "num_targets": 2},
        "pert_column": "target_gene",
        "control_label": "non-targeting",
        "context_column": context_column,
        "scale": "log1p",
        "notes": ["a note"],
        "parts": [
            {"file": f"H1/{target}.h5ad", "target": target, "context": "H1", "num_cells": cells}
            for target, cells in PARTS
        ],
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    write_manifest(folder, Manifest("parts"))
    return folder


def test_the_prediction_is_the_parts_in_the_plans_order(tmp_path: Path) -> None:
    out = assemble(write_parts(tmp_path / "parts"), tmp_path / "p.h5ad")
    cells = ad.read_h5ad(out)
    expected = np.concatenate([part_values(*part) for part in PARTS])
    assert sparse.isspmatrix_csr(cells.X)
    assert cells.X.dtype == np.float32
    assert np.array_equal(cells.X.toarray(), expected)
    assert cells.var_names.tolist() == list(SMALL_GENES)
    assert cells.obs_names.tolist() == [str(i) for i in range(15)]
    assert list(cells.obs) == ["target_gene", "batch"]
    assert cells.obs["target_gene"].tolist() == ["G3"] * 4 + ["G1"] * 6 + ["non-targeting"] * 5
    assert cells.obs["target_gene"].dtype == "category"
    assert cells.obs["batch"].tolist() == [f"b{i % 2}" for _, n in PARTS for i in range(n)]


def test_what_is_assembled_passes_the_check(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    out = assemble(parts, tmp_path / "p.h5ad")
    assert check(out, season="vcc2025", genes=parts / "genes.csv", rules={"num_genes": 20}).ok


def test_contexts_where_the_season_has_them_and_batches_where_all_parts_do(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts", context_column="context", batch=False)
    cells = ad.read_h5ad(assemble(parts, tmp_path / "p.h5ad"))
    assert list(cells.obs) == ["target_gene", "context"]
    assert set(cells.obs["context"]) == {"H1"}


@settings(max_examples=12, deadline=None)
@given(st.permutations([0, 1, 2]), st.integers(1, 7))
def test_any_order_of_the_folder_gives_the_same_bytes(order: list[int], step: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one = assemble(write_parts(folder / "one"), folder / "one.h5ad")
        other = assemble(write_parts(folder / "other", order=order, step=step), folder / "other.h5ad")
        assert one.read_bytes() == other.read_bytes()


def test_the_manifest_and_the_skip(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    out = assemble(parts, tmp_path / "p.h5ad")
    manifest = read_manifest(out, kind="prediction")
    assert manifest.facts == {"cells": 15, "controls": 5, "targets": 2, "scale": "log1p"}
    assert manifest.notes == ("a note",)
    assert verify_artefact(out) == []
    before = out.stat().st_mtime_ns
    assert assemble(parts, out) == out
    assert out.stat().st_mtime_ns == before
    out.write_bytes(out.read_bytes()[:-100] + bytes(100))
    with pytest.raises(DataError, match="was changed since"):
        assemble(parts, out)
    assemble(parts, out, force=True)
    assert verify_artefact(out) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.h5ad", "p.h5ad.manifest.json", "parts"]


def test_other_parts_are_assembled_again(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    out = assemble(parts, tmp_path / "p.h5ad")
    before = out.read_bytes()
    write_part(parts / "H1" / "G3.h5ad", "G3", 4, batch=False)
    manifest_path(parts).unlink()
    write_manifest(parts, Manifest("parts"))
    assemble(parts, out)
    assert out.read_bytes() != before
    assert list(ad.read_h5ad(out).obs) == ["target_gene"]


def edit_plan(parts: Path, values: dict[str, Any]) -> None:
    plan = json.loads((parts / "plan.json").read_text())
    (parts / "plan.json").write_text(json.dumps({**plan, **values}))
    manifest_path(parts).unlink(missing_ok=True)
    write_manifest(parts, Manifest("parts"))


def refusal(parts: Path) -> SubmissionError:
    out = parts.parent / "p.h5ad"
    with pytest.raises(SubmissionError) as caught:
        assemble(parts, out)
    assert sorted(path.name for path in parts.parent.iterdir()) == [parts.name]
    return caught.value


def test_missing_parts_are_named_with_the_remedy(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    for target in ("G3", "non-targeting"):
        (parts / "H1" / f"{target}.h5ad").unlink()
    error = refusal(parts)
    assert [problem.message for problem in error.problems] == [
        "the part of 'G3' is missing",
        "the part of 'non-targeting' is missing",
    ]
    assert "pertcast generate" in str(error)


def test_every_part_that_is_not_as_planned_is_named_at_once(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    write_part(parts / "H1" / "G3.h5ad", "G7", 4)
    write_part(parts / "H1" / "G1.h5ad", "G1", 5)
    (parts / "H1" / "non-targeting.h5ad").write_bytes(b"no file")
    text = str(refusal(parts))
    assert text.count("its content is not what the manifest says") == 3
    assert "expected the label 'G3' in every cell, got 'G7'" in text
    assert "expected 6 cells, got 5" in text
    assert "not an HDF5 file" in text


def test_other_genes_are_refused(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    (parts / "genes.csv").write_text("".join(f"{gene}\n" for gene in reversed(SMALL_GENES)))
    edit_plan(parts, {})
    assert len(refusal(parts).problems) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parts": []}, "it has no parts"),
        ({"parts": [{"file": "H1/G1.h5ad"}]}, "not a plan of pertcast"),
        ({"parts": [{"file": "../x.h5ad", "target": "G1", "context": "H1", "num_cells": 3}]}, "outside the folder"),
        ({"parts": 7}, "not a plan of pertcast"),
        ({"rules": None}, "not a plan of pertcast"),
    ],
)
def test_wrong_plans(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    parts = write_parts(tmp_path / "parts")
    edit_plan(parts, values)
    assert message in str(refusal(parts))


def test_folders_that_are_no_finished_parts(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    manifest_path(parts).unlink()
    assert "it was not finished" in str(refusal(parts))
    (parts / "plan.json").write_text("{")
    assert "not valid JSON" in str(refusal(parts))
    (parts / "plan.json").unlink()
    assert "pertcast generate" in str(refusal(parts))


def test_a_context_that_is_not_the_plans(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts", context_column="context", context="K562")
    assert "expected the label 'H1' in every cell, got 'K562'" in str(refusal(parts))


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SubmissionError, match="cannot be written"):
        assemble(parts, tmp_path / "file" / "p.h5ad")
