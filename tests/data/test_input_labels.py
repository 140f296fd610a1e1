"""Labels that go in are checked as strictly as those that come out, all at once, and renamed before anything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import write_small_h5ad
from pertcast.config import Experiment
from pertcast.data.experiment import read_cells
from pertcast.data.features import load_features
from pertcast.data.prepare import prepare
from pertcast.data.split import Split, assign_split
from pertcast.data.store import Store
from pertcast.errors import DataError
from pertcast.files.labels import dubious_labels, file_name, is_control_name
from pertcast.submission.check import check

CONTROL = "non-targeting"
LONG = "+".join(f"GENE{number:02d}" for number in range(45))


def write_labels(path: Path, change: Callable[[int, str], object]) -> Path:
    """Write a small file with its perturbation labels changed, cell by cell."""
    cells = ad.read_h5ad(write_small_h5ad(path))
    cells.obs["target_gene"] = [change(row, str(label)) for row, label in enumerate(cells.obs["target_gene"])]
    cells.write_h5ad(path)
    return path


def experiment_of(path: Path, **sections: Any) -> Experiment:
    columns = {"cell_type": "cell_type", "batch": "batch", **sections.pop("columns", {})}
    return Experiment.model_validate(
        {"datasets": {"d": str(path)}, "training": {"d": "train"}, "columns": columns, **sections}
    )


def swap(old: str, new: object, every: int = 1) -> Callable[[int, str], object]:
    return lambda row, label: new if label == old and row % every == 0 else label


@pytest.mark.parametrize(
    ("change", "label", "why", "entry"),
    [
        (swap("G1", "", 2), "", "no label", None),
        (swap("G1", "nan", 2), "nan", "no label", None),
        (swap("G1", "None", 2), "None", "no label", None),
        (swap("G1", "G1 ", 3), "G1 ", "spaces around it", '"G1 " = "G1"'),
        (swap("G1", "G1\u00a0", 3), "G1\u00a0", "spaces around it", '"G1\u00a0" = "G1"'),
        (swap("G1", "g1", 3), "g1", "another case of 'G1'", '"g1" = "G1"'),
        (swap(CONTROL, "ctrl", 3), "ctrl", "another name for the control", '"ctrl" = "non-targeting"'),
        (swap(CONTROL, "Non-Targeting", 3), "Non-Targeting", "another case", '"Non-Targeting" = "non-targeting"'),
        (swap(CONTROL, f"{CONTROL} ", 3), f"{CONTROL} ", "spaces around", '"non-targeting " = "non-targeting"'),
        (swap(CONTROL, f"{CONTROL}_2", 3), f"{CONTROL}_2", "another name", '"non-targeting_2" = "non-targeting"'),
        (swap(CONTROL, "DMSO", 3), "DMSO", "another name for the control", '"DMSO" = "non-targeting"'),
        (
            lambda row, label: {"G1": "G1+G2", "G2": "G2+G1"}.get(label, label),
            "G2+G1",
            "the same genes",
            '"G2+G1" = "G1+G2"',
        ),
        (
            lambda row, label: {"G1": "G1+G2", "G2": "G2+g1"}.get(label, label),
            "G2+g1",
            "the same genes",
            '"G2+g1" = "G1+G2"',
        ),
        (swap("G1", LONG), LONG, "too long for a file name", None),
    ],
)
def test_a_label_that_is_likely_a_mistake_is_refused(
    tmp_path: Path, change: Callable[[int, str], object], label: str, why: str, entry: str | None
) -> None:
    path = write_labels(tmp_path / "a.h5ad", change)
    number = int((ad.read_h5ad(path).obs["target_gene"] == label).sum())
    with pytest.raises(DataError) as caught:
        prepare(experiment_of(path), tmp_path / "store")
    (problem,) = caught.value.problems
    assert problem.place == f"perturbation {label!r} ({number:,} cells in a.h5ad)"
    assert why in problem.message
    assert (entry or "[columns.rename]") in problem.remedy
    assert not (tmp_path / "store").exists()
    # the remedy works
    name = "G3" if entry is None else json.loads(entry.partition(" = ")[2])
    store = Store.open(prepare(experiment_of(path, columns={"rename": {label: name}}), tmp_path / "store"))
    assert label not in store.perts


def test_all_of_them_are_reported_at_once_over_all_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_labels(tmp_path / "data" / "a.h5ad", lambda row, label: {"G1": "g1", "G2": "nan"}.get(label, label))
    write_small_h5ad(tmp_path / "data" / "b.h5ad", perts=(CONTROL, "G1", "ntc"))
    with pytest.raises(DataError) as caught:
        read_cells(experiment_of(tmp_path / "data"))
    assert [problem.place.split(" (")[0] for problem in caught.value.problems] == [
        "perturbation 'g1'",
        "perturbation 'nan'",
        "perturbation 'ntc'",
    ]


def test_cell_types_are_checked_too(tmp_path: Path) -> None:
    path = write_small_h5ad(tmp_path / "a.h5ad", contexts=("H1", "h1", "K562 "))
    with pytest.raises(DataError) as caught:
        read_cells(experiment_of(path))
    assert [problem.place.split(" (")[0] for problem in caught.value.problems] == [
        "cell type 'K562 '",
        "cell type 'h1'",
    ]


def test_a_batch_without_a_name_is_unknown(tmp_path: Path) -> None:
    path = write_small_h5ad(tmp_path / "a.h5ad", batches=("b1", "nan"))
    cells = read_cells(experiment_of(path))
    assert cells.batches == ("b1",)
    assert (cells.batch_codes < 0).sum() == 48
    assert any("48 cells have no value in 'batch'" in note for note in cells.notes)


def test_a_label_that_is_confirmed_is_kept(tmp_path: Path) -> None:
    path = write_labels(tmp_path / "a.h5ad", swap("G1", "CTRL"))
    cells = read_cells(experiment_of(path, columns={"rename": {"CTRL": "CTRL"}}))
    assert "CTRL" in cells.keys.perts


def two_datasets(tmp_path: Path, **of: Any) -> Experiment:
    """Return an experiment of two datasets, the second with "CTRL" in place of G1."""
    files = {"d": write_small_h5ad(tmp_path / "d.h5ad"), "o": write_labels(tmp_path / "o.h5ad", swap("G1", "CTRL"))}
    columns = {
        "cell_type": "cell_type",
        "batch": "batch",
        "of": {name: {"rename": table} for name, table in of.items()},
    }
    datasets = {name: str(path) for name, path in files.items()}
    return Experiment.model_validate(
        {"datasets": datasets, "training": dict.fromkeys(datasets, "train"), "columns": columns}
    )


def test_a_rename_of_another_datasets_label_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_cells(two_datasets(tmp_path, d={"CTRL": "G1"}))
    places = [problem.place for problem in caught.value.problems]
    assert places[0] == "[columns.of.d.rename] 'CTRL'"
    assert "24 cells in o.h5ad" in places[1]
    assert "CTRL" not in read_cells(two_datasets(tmp_path, o={"CTRL": "G1"})).keys.perts


def test_a_label_is_kept_in_the_dataset_that_confirms_it(tmp_path: Path) -> None:
    assert "CTRL" in read_cells(two_datasets(tmp_path, o={"CTRL": "CTRL"})).keys.perts
    write_labels(tmp_path / "d.h5ad", swap("G2", "CTRL"))
    experiment = two_datasets(tmp_path, o={"CTRL": "CTRL"})
    write_labels(tmp_path / "d.h5ad", swap("G2", "CTRL"))
    with pytest.raises(DataError) as caught:
        read_cells(experiment)
    assert [problem.place for problem in caught.value.problems] == ["perturbation 'CTRL' (24 cells in d.h5ad)"]


def test_a_label_that_a_rename_makes_can_be_kept(tmp_path: Path) -> None:
    path = write_small_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(DataError, match='keep it with "CTRL" = "CTRL"'):
        read_cells(experiment_of(path, columns={"rename": {"G1": "CTRL"}}))
    kept = read_cells(experiment_of(path, columns={"rename": {"G1": "CTRL", "CTRL": "CTRL"}}))
    assert "CTRL" in kept.keys.perts
    assert "G1" not in kept.keys.perts


def test_missing_values_hide_no_other_problem(tmp_path: Path) -> None:
    labels: dict[str, object] = {"G1": None, "G2": "g3"}
    path = write_labels(tmp_path / "a.h5ad", lambda row, label: labels.get(label, label))
    with pytest.raises(DataError) as caught:
        read_cells(experiment_of(path))
    said = [str(problem) for problem in caught.value.problems]
    assert len(said) == 2
    assert "24 cells have no value" in said[0]
    assert "another case of 'G3'" in said[1]


def test_a_rename_of_nothing_is_an_error(tmp_path: Path) -> None:
    path = write_small_h5ad(tmp_path / "a.h5ad")
    columns = {"rename": {"g1 ": "G1"}, "of": {"d": {"rename": {"G7x": "G7"}}}}
    with pytest.raises(DataError) as caught:
        read_cells(experiment_of(path, columns=columns))
    assert [problem.place for problem in caught.value.problems] == [
        "[columns.rename] 'g1 '",
        "[columns.of.d.rename] 'G7x'",
    ]
    assert "did you mean 'G1'" in caught.value.problems[0].remedy


def test_no_spelling_leaks_out_of_what_is_held_out(tmp_path: Path) -> None:
    """Held-out labels are matched after renaming, and may be written in either spelling."""
    path = write_labels(tmp_path / "a.h5ad", lambda row, label: "g1" if label == "G1" and row % 2 else label)
    for held in ("G1", "g1"):
        experiment = experiment_of(path, columns={"rename": {"g1": "G1"}}, fewshot={"d.H1": {"test": (held,)}})
        keys = read_cells(experiment).keys
        flags = assign_split(experiment, keys)
        ours = keys.pert_codes == keys.perts.index("G1")
        assert ours.sum() == 24
        assert (flags[ours] == Split.TEST).all()


def test_a_gene_with_the_control_has_the_genes_own_feature(tmp_path: Path) -> None:
    labels = {"G1": "G1+ctrl", "G2": "ctrl+G2", "G3": "G3+G4"}
    path = write_labels(
        tmp_path / "a.h5ad", lambda row, label: labels.get(label, "ctrl" if label == CONTROL else label)
    )
    vectors = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    np.savez(tmp_path / "f.npz", gene=np.array([*(f"G{n}" for n in range(5)), "ctrl"]), embedding=vectors)
    columns = {"control": "ctrl"}
    store = Store.open(prepare(experiment_of(path, columns=columns), tmp_path / "store"))
    for combine in ("sum", "mean", "none"):
        missing = "mean" if combine == "none" else "error"
        features = {"kind": "file", "path": tmp_path / "f.npz", "combine": combine, "missing": missing}
        found = load_features(experiment_of(path, columns=columns, features=features).features, store)
        np.testing.assert_allclose(found.of(["G1+ctrl", "ctrl+G2"]), vectors[1:3], rtol=1e-6)
        if combine != "none":
            pair = vectors[3:5].sum(0) if combine == "sum" else vectors[3:5].mean(0)
            np.testing.assert_allclose(found.of(["G3+G4"])[0], pair, rtol=1e-6)
    indicators = load_features(experiment_of(path, columns=columns, features={"kind": "labels"}).features, store)
    assert indicators.of(["G1+ctrl"]).sum() == 1


def test_check_refuses_the_same_labels_in_a_prediction(tmp_path: Path) -> None:
    path = write_labels(tmp_path / "p.h5ad", lambda row, label: {"G1": "g3", "G2": "nan"}.get(label, label))
    genes = tmp_path / "genes.csv"
    genes.write_text("".join(f"G{number}\n" for number in range(20)))
    rules = {"num_genes": 20, "num_targets": 3}
    said = [str(problem) for problem in check(path, season="vcc2025", genes=genes, rules=rules).problems]
    assert any("'g3': it is another case of 'G3'" in text for text in said)
    assert any("no label in 24 cells" in text for text in said)


def test_check_refuses_labels_that_prepare_would_refuse(tmp_path: Path) -> None:
    genes = tmp_path / "genes.csv"
    genes.write_text("".join(f"G{number}\n" for number in range(20)))
    path = write_labels(
        tmp_path / "p.h5ad", lambda row, label: {"G1": "G1+G2", "G2": "G2+g1", "G3": LONG}.get(label, label)
    )
    rules = {"num_genes": 20, "num_targets": 3}
    said = [str(problem) for problem in check(path, season="vcc2025", genes=genes, rules=rules).problems]
    assert any("'G2+g1': it names the same genes as 'G1+G2'" in text for text in said)
    assert any("too long for a file name" in text for text in said)


@given(st.dictionaries(st.text(max_size=8), st.integers(1, 50), max_size=6))
def test_clean_labels_pass_and_dirty_ones_name_what_is_meant(cells: dict[str, int]) -> None:
    cells[CONTROL] = 10
    found = {item.label: item for item in dubious_labels(cells, control=CONTROL)}
    assert CONTROL not in found
    folded: dict[str, list[str]] = {}
    for label in cells:
        folded.setdefault(label.strip().casefold(), []).append(label)
    for spellings in folded.values():
        # of several spellings at most one is clean
        assert sum(label not in found for label in spellings) <= 1
    for item in found.values():
        assert not item.meant or item.label != item.meant
    assert set(found) == {item.label for item in dubious_labels(cells, control=CONTROL, kept=["another"])}
    assert not dubious_labels(cells, control=CONTROL, kept=list(cells))


def test_names_of_the_control_and_of_files() -> None:
    assert [is_control_name(name, CONTROL) for name in ("NT", "NTC", "safe-targeting_7", CONTROL, "NT5E", "TP53")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    assert file_name("A/B") == "A%2FB.h5ad"
