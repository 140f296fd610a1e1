"""A sample is valid in every rule of its season, the same for the same seed, and leaves nothing beside it."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

from pertcast.cli.app import main
from pertcast.errors import DataError, SubmissionError
from pertcast.files.artefacts import read_manifest, verify_artefact
from pertcast.seasons import season as season_of
from pertcast.submission.check import check
from pertcast.submission.pack import unpack
from pertcast.submission.random_sample import RandomCells, sample
from pertcast.submission.season_bundle import fingerprint

GENES = tuple(f"G{number}" for number in range(30))
RULES: dict[str, dict[str, Any]] = {
    "vcc2025": {"num_genes": 30, "num_targets": 3, "max_cells": 100},
    "vcc2026": {"num_genes": 30, "num_targets": 3, "max_cells": 100, "cells_per_target": 5, "max_cell_sum": 40},
}
LISTS = {"vcc2025": "target_gene,n_cells\nG1,40\nG2,41\nNEW,50\n", "vcc2026": "target_gene\nG1\nG2\nNEW\n"}


def lists(folder: Path, season: str, *, targets: str | None = None) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    genes, listed = folder / "genes.csv", folder / "targets.csv"
    genes.write_text("gene_name\n" * (season == "vcc2026") + "".join(f"{gene}\n" for gene in GENES))
    listed.write_text(targets or LISTS[season])
    return {"genes": genes, "targets": listed}


def make(
    folder: Path,
    season: str,
    *,
    name: str = "s.vcc",
    rules: dict[str, Any] | None = None,
    seed: int = 0,
    counts_per_cell: int = 30,
) -> Path:
    in_force, cells = season_of(season, rules or RULES[season]), RandomCells(seed, counts_per_cell)
    return sample(folder / name, season=in_force, **lists(folder / "lists", season), cells=cells)


def cells_of(vcc: Path) -> ad.AnnData:
    return ad.read_h5ad(unpack(vcc, vcc.with_suffix(".h5ad")))


@pytest.mark.parametrize("season", RULES)
def test_it_is_valid_and_alone(tmp_path: Path, season: str) -> None:
    vcc = make(tmp_path, season)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lists", "s.vcc", "s.vcc.manifest.json"]
    assert verify_artefact(vcc) == []
    back = unpack(vcc, tmp_path / "back.h5ad")
    report = check(back, season=season, rules=RULES[season], **lists(tmp_path / "lists", season))
    assert report.problems == ()
    assert False not in [item.ok for item in report.checklist]
    assert read_manifest(vcc).notes[-1] == "random cells of seed 0, to try the upload with: no prediction"


def test_season_2025_is_log1p_with_controls_within_the_cap(tmp_path: Path) -> None:
    cells = cells_of(make(tmp_path, "vcc2025"))
    # 5 controls under a cap of 100 leave 95 cells for the 131 asked for
    expected = {"non-targeting": 5, "G1": 40 * 95 // 131, "G2": 41 * 95 // 131, "NEW": 50 * 95 // 131}
    assert cells.obs["target_gene"].value_counts().to_dict() == expected
    assert cells.X.data.max() < 15
    np.testing.assert_allclose(np.expm1(cells.X.toarray()).sum(1), 1e4, rtol=1e-4)


def test_season_2026_is_counts_in_every_context(tmp_path: Path) -> None:
    vcc = make(tmp_path, "vcc2026")
    cells = cells_of(vcc)
    assert cells.obs.groupby(["context", "target_gene"], observed=True).size().to_dict() == {
        (context, target): 5 for context in "ABC" for target in ("G1", "G2", "NEW")
    }
    sums = cells.X.toarray().sum(1)
    assert sums.max() <= 40
    assert 25 < sums.mean() < 35
    with tarfile.open(vcc) as tar:
        assert tar.getnames() == ["meta.json", "pred.h5ad.zst"]
        meta = json.loads((tar.extractfile("meta.json") or io.BytesIO()).read())
    assert meta["nnz"] == cells.X.nnz
    assert meta["perts_fingerprint"] == fingerprint(("G1", "G2", "NEW"))


@pytest.mark.parametrize("season", RULES)
def test_equal_seeds_are_equal_bytes(tmp_path: Path, season: str) -> None:
    one, same, other = (
        make(tmp_path, season, name=f"{name}.vcc", seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert one.read_bytes() == same.read_bytes()
    assert not np.array_equal(cells_of(one).X.toarray(), cells_of(other).X.toarray())


def test_the_cells_of_a_target_do_not_depend_on_the_others(tmp_path: Path) -> None:
    whole = cells_of(make(tmp_path, "vcc2026"))
    fewer = lists(tmp_path / "fewer", "vcc2026", targets="target_gene\nNEW\nG2\n")
    rules = {**RULES["vcc2026"], "num_targets": 2}
    part = cells_of(
        sample(
            tmp_path / "part.vcc", season=season_of("vcc2026", rules), **fewer, cells=RandomCells(counts_per_cell=30)
        )
    )
    for cells in (whole, part):
        cells.obs["key"] = cells.obs["context"].astype(str) + cells.obs["target_gene"].astype(str)
    for key in part.obs["key"].unique():
        first, second = (cells[cells.obs["key"] == key].to_df().to_numpy() for cells in (whole, part))
        assert np.array_equal(first, second)


def test_contexts_are_those_of_the_rule_or_of_the_bundle(tmp_path: Path) -> None:
    final = make(tmp_path, "vcc2026", rules={**RULES["vcc2026"], "contexts": "D,E,F"})
    assert sorted(cells_of(final).obs["context"].unique()) == ["D", "E", "F"]
    (tmp_path / "lists" / "manifest.json").write_text('{"contexts": ["X", "Y"], "panel_id": "p7"}')
    vcc = make(tmp_path, "vcc2026", name="b.vcc")
    assert sorted(cells_of(vcc).obs["context"].unique()) == ["X", "Y"]
    with tarfile.open(vcc) as tar:
        assert json.loads((tar.extractfile("meta.json") or io.BytesIO()).read())["panel_id"] == "p7"


def test_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(SubmissionError, match="are 45 cells, and the season allows 44"):
        make(tmp_path, "vcc2026", rules={**RULES["vcc2026"], "max_cells": 44})
    with pytest.raises(SubmissionError, match="at least 1, got 0"):
        make(tmp_path, "vcc2026", counts_per_cell=0)
    with pytest.raises(DataError, match="does not say how many cells"):
        listed = lists(tmp_path / "lists", "vcc2025", targets="target_gene\nG1\n")
        sample(tmp_path / "s.vcc", season=season_of("vcc2025", RULES["vcc2025"]), **listed)
    with pytest.raises(SubmissionError, match="would replace a list"):
        listed = lists(tmp_path / "lists", "vcc2026")
        sample(listed["targets"], season=season_of("vcc2026", RULES["vcc2026"]), **listed)
    with pytest.raises(SubmissionError, match="cannot be written"):
        make(tmp_path, "vcc2026", name="lists/genes.csv/s.vcc")
    assert [path.name for path in tmp_path.iterdir()] == ["lists"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = lists(tmp_path / "lists", "vcc2026")
    rules = [f"--rule={name}={value}" for name, value in RULES["vcc2026"].items()]
    files = ["--genes", str(listed["genes"]), "--targets", str(listed["targets"]), "-o", str(tmp_path / "s.vcc")]
    with pytest.raises(SystemExit) as caught:
        main(["sample", "--season", "vcc2026", *files, *rules, "--seed", "3", "--counts-per-cell", "30"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "s.vcc")
    assert (tmp_path / "s.vcc").read_bytes() == make(tmp_path, "vcc2026", name="again.vcc", seed=3).read_bytes()
