"""Datasets, columns and the split: cell-load's meaning, disjoint, stable, and every mistake told with its place."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertcast.config import Experiment, load_experiment
from pertcast.data.experiment import dataset_files, read_cells
from pertcast.data.prepare import prepare
from pertcast.data.split import CellKeys, Split, assign_split
from pertcast.errors import ConfigError, DataError

Builder = Callable[..., Path]
CONTROL = "non-targeting"


def _experiment(**sections: Any) -> Experiment:
    sections.setdefault("datasets", {"d": "/nowhere"})
    sections.setdefault("training", {"d": "train"})
    sections.setdefault("columns", {"cell_type": "cell_type", "batch": "batch"})
    return Experiment.model_validate(sections, strict=False)


def _keys(
    *,
    datasets: tuple[str, ...] = ("d",),
    contexts: tuple[str, ...] = ("A", "B"),
    perts: tuple[str, ...] = ("P1", "P2", "P3", CONTROL),
    cells: int = 10,
) -> CellKeys:
    """Every dataset x context x perturbation has the same number of cells."""
    grid = [
        (d, c, p)
        for d in range(len(datasets))
        for c in range(len(contexts))
        for p in range(len(perts))
        for _ in range(cells)
    ]
    codes = np.array(grid, dtype=np.int32)
    return CellKeys(
        datasets=datasets,
        contexts=contexts,
        perts=perts,
        files=tuple(f"{name}.h5ad" for name in datasets),
        dataset_codes=codes[:, 0],
        context_codes=codes[:, 1],
        pert_codes=codes[:, 2],
        file_codes=codes[:, 0],
        names=np.array([f"cell{i}" for i in range(len(grid))], dtype=object),
    )


def _permuted(keys: CellKeys, order: np.ndarray) -> CellKeys:
    return CellKeys(
        keys.datasets,
        keys.contexts,
        keys.perts,
        keys.files,
        keys.dataset_codes[order],
        keys.context_codes[order],
        keys.pert_codes[order],
        keys.file_codes[order],
        keys.names[order],
    )


def _flags_of(flags: np.ndarray, keys: CellKeys, context: str, pert: str, dataset: str = "d") -> np.ndarray:
    chosen = (
        (keys.context_codes == keys.contexts.index(context))
        & (keys.pert_codes == keys.perts.index(pert))
        & (keys.dataset_codes == keys.datasets.index(dataset))
    )
    found: np.ndarray = flags[chosen]
    return found


def test_folder_file_pattern_and_braces(tmp_path: Path) -> None:
    for name in ("b.h5", "a.h5ad", "c.h5ad", "notes.txt", "sub/d.h5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(pattern: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in dataset_files("d", f"{tmp_path}{pattern}")]

    assert found("") == ["a.h5ad", "b.h5", "c.h5ad"]
    assert found("/notes.txt") == ["notes.txt"]
    assert found("/*") == ["sub/d.h5"]  # folders, as in cell-load
    assert found("/{a,c}.h5ad") == ["a.h5ad", "c.h5ad"]
    assert found("/{b.h5,sub/{d,d}.h5}") == ["b.h5", "sub/d.h5"]
    assert found("/**/*.h5") == ["b.h5", "sub/d.h5"]
    assert found("/[ab].h5*") == ["a.h5ad", "b.h5"]


@pytest.mark.parametrize("pattern", ["/none.h5ad", "/*.h5ad", ""])
def test_nothing_to_match_is_an_error(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(DataError, match=re.escape(f'[datasets] d = "{tmp_path}{pattern}": no .h5 or .h5ad file')):
        dataset_files("d", f"{tmp_path}{pattern}")


def test_every_alternative_that_matches_nothing_is_named(tmp_path: Path, small_h5ad: Builder) -> None:
    small_h5ad("k562.h5")
    with pytest.raises(DataError) as caught:
        dataset_files("d", f"{tmp_path}/{{k562, hepg2,rpe1}}.h5")
    places = [problem.place.rpartition(" ")[2] for problem in caught.value.problems]
    assert places == [f"{tmp_path}/hepg2.h5", f"{tmp_path}/rpe1.h5"]


def test_patterns_mean_what_they_mean_in_cell_load(tmp_path: Path, small_h5ad: Builder) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    paths = {name: small_h5ad(f"{name}.h5") for name in ("k562", "rpe1", "one/jurkat", "two/hepg2")}
    for pattern, names in {
        "{k562, rpe1}.h5": ("k562", "rpe1"),
        "{one,two}": ("one/jurkat", "two/hepg2"),
        "{ one , two }/*.h5": ("one/jurkat", "two/hepg2"),
        "*": ("one/jurkat", "two/hepg2"),
        "{one,two}/*": ("one/jurkat", "two/hepg2"),
        "*.h5": ("k562", "rpe1"),
        "": ("k562", "rpe1"),
        "[kr]*.h5": ("k562", "rpe1"),
        "**/*.h5": tuple(paths),
    }.items():
        assert dataset_files("d", f"{tmp_path}/{pattern}") == sorted(paths[name] for name in names), pattern


def test_two_names_for_one_content_are_refused(tmp_path: Path, small_h5ad: Builder) -> None:
    first = small_h5ad("first.h5ad")
    shutil.copy(first, tmp_path / "second.h5ad")
    with pytest.raises(DataError, match=r"second\.h5ad: has the same content as .*first\.h5ad; leave one"):
        prepare(_experiment(datasets={"d": str(tmp_path / "*.h5ad")}), tmp_path / "store")


def test_a_path_is_relative_to_the_file_then_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside, here):
        folder.mkdir()
    (beside / "e.toml").write_text('[datasets]\nd = "data/*.h5"\n[submission]\ngenes = "genes.csv"\n')
    (here / "genes.csv").write_text("G1\n")
    (here / "data").mkdir()
    monkeypatch.chdir(here)
    found = load_experiment(beside / "e.toml")
    assert (found.datasets["d"], found.submission.genes) == (str(here / "data" / "*.h5"), here / "genes.csv")
    assert "the one in the working folder is used" in caplog.text
    (beside / "genes.csv").write_text("G1\n")
    (beside / "data").mkdir()
    caplog.clear()
    found = load_experiment(beside / "e.toml")
    assert (found.datasets["d"], found.submission.genes) == (str(beside / "data" / "*.h5"), beside / "genes.csv")
    assert not caplog.text
    # what is typed on the command line is relative to the working folder
    typed = load_experiment(beside / "e.toml", ["submission.genes=genes.csv", 'datasets.d="data/{a,b}"'])
    assert (typed.datasets["d"], typed.submission.genes) == (str(here / "data" / "{a,b}"), here / "genes.csv")


def test_cells_of_several_files_and_datasets(small_h5ad: Builder, tmp_path: Path) -> None:
    small_h5ad("one.h5ad", contexts=("H1",), perts=(CONTROL, "G1"))
    other = small_h5ad("two.h5ad", contexts=("K562", "H1"), perts=("G2", CONTROL), batches=("b2", "b3"))
    cells = read_cells(_experiment(datasets={"d": str(tmp_path)}))
    assert [(name, path.name, size) for name, path, size in cells.files] == [
        ("d", "one.h5ad", 48),
        ("d", "two.h5ad", 96),
    ]
    assert cells.keys.perts == ("G1", "G2", CONTROL)
    assert cells.keys.contexts == ("H1", "K562")
    assert cells.batches == ("d/one.h5ad.b1", "d/one.h5ad.b2", "d/two.h5ad.b2", "d/two.h5ad.b3")
    assert cells.batch_labels == ("b1", "b2", "b2", "b3")
    expected = ad.read_h5ad(other).obs
    assert [cells.keys.contexts[code] for code in cells.keys.context_codes[48:]] == expected["cell_type"].tolist()
    assert [cells.keys.perts[code] for code in cells.keys.pert_codes[48:]] == expected["target_gene"].tolist()
    assert [cells.batch_labels[code] for code in cells.batch_codes[48:]] == expected["batch"].tolist()
    assert cells.keys.names[48:].tolist() == expected.index.tolist()
    two = read_cells(_experiment(datasets={"d": str(tmp_path / "one.h5ad"), "e": str(tmp_path / "two.h5ad")}))
    assert two.batches == ("d.b1", "d.b2", "e.b2", "e.b3")


def test_batches_may_be_unknown_and_one_context_may_be_named(small_h5ad: Builder) -> None:
    path = small_h5ad()
    cells = read_cells(_experiment(datasets={"d": str(path)}, columns={"context": "H9"}))
    assert cells.keys.contexts == ("H9",)
    assert cells.batches == ()
    assert (cells.batch_codes == -1).all()


def test_gaps_are_errors_in_labels_and_notes_in_batches(small_h5ad: Builder) -> None:
    path = small_h5ad()
    data = ad.read_h5ad(path)
    data.obs.iloc[3:5, data.obs.columns.get_loc("batch")] = np.nan
    data.write_h5ad(path)
    cells = read_cells(_experiment(datasets={"d": str(path)}))
    assert cells.notes == ("2 cells have no value in 'batch': their batch is unknown",)
    assert (cells.batch_codes < 0).nonzero()[0].tolist() == [3, 4]
    data.obs.iloc[7:8, data.obs.columns.get_loc("target_gene")] = np.nan
    data.write_h5ad(path)
    with pytest.raises(DataError, match="1 cells have no value, the first is row 7"):
        read_cells(_experiment(datasets={"d": str(path)}))


def test_columns_are_never_guessed(small_h5ad: Builder) -> None:
    datasets = {"d": str(small_h5ad())}
    with pytest.raises(DataError, match=r"obs \(cell_type, target_gene, batch\).*set columns.cell_type"):
        read_cells(_experiment(datasets=datasets, columns={}))
    with pytest.raises(ConfigError, match="cell_type and context are both given"):
        read_cells(_experiment(datasets=datasets, columns={"cell_type": "cell_type", "context": "H1"}))
    with pytest.raises(DataError) as caught:
        read_cells(_experiment(datasets=datasets, columns={"cell_type": "celltype", "pert": "gene", "batch": "plate"}))
    assert len(caught.value.problems) == 3


def test_problems_of_all_files_are_told_at_once(small_h5ad: Builder, tmp_path: Path) -> None:
    small_h5ad("a.h5ad")
    (tmp_path / "b.h5ad").write_text("text")
    (tmp_path / "c.h5ad").write_text("text")
    with pytest.raises(DataError) as caught:
        read_cells(_experiment(datasets={"d": str(tmp_path)}))
    assert [Path(problem.place).name for problem in caught.value.problems] == ["b.h5ad", "c.h5ad"]


def test_a_file_without_cells_is_an_error(small_h5ad: Builder) -> None:
    path = small_h5ad()
    ad.read_h5ad(path)[:0].copy().write_h5ad(path)
    with pytest.raises(DataError, match="expected cells x genes, got 0 x 20"):
        read_cells(_experiment(datasets={"d": str(path)}))


def test_a_file_belongs_to_one_dataset(small_h5ad: Builder) -> None:
    path = str(small_h5ad())
    with pytest.raises(DataError, match="is in dataset d and in e; list each file once"):
        read_cells(_experiment(datasets={"d": path, "e": path}))


def test_training_alone_trains_everything() -> None:
    assert (assign_split(_experiment(), _keys()) == Split.TRAIN).all()


def test_zeroshot_holds_out_a_cell_type_but_for_its_controls() -> None:
    keys = _keys(cells=20)
    flags = assign_split(_experiment(zeroshot={"d.B": "test"}), keys)
    assert (_flags_of(flags, keys, "B", "P1") == Split.TEST).all()
    assert (_flags_of(flags, keys, "A", "P1") == Split.TRAIN).all()
    assert (_flags_of(flags, keys, "A", CONTROL) == Split.TRAIN).all()
    assert sorted(_flags_of(flags, keys, "B", CONTROL)) == [Split.TRAIN] * 18 + [Split.TEST] * 2


def test_fewshot_holds_out_listed_labels() -> None:
    keys = _keys(cells=20)
    fewshot = {"d.A": {"val": ["P1", "P2"], "test": ["P2"]}}
    flags = assign_split(_experiment(fewshot=fewshot, prepare={"val_controls": 0.2, "test_controls": 0.15}), keys)
    assert (_flags_of(flags, keys, "A", "P1") == Split.VAL).all()
    assert (_flags_of(flags, keys, "A", "P2") == Split.VAL | Split.TEST).all()
    assert (_flags_of(flags, keys, "A", "P3") == Split.TRAIN).all()
    assert (_flags_of(flags, keys, "B", "P1") == Split.TRAIN).all()
    assert sorted(_flags_of(flags, keys, "A", CONTROL)) == [1] * 13 + [2] * 4 + [4] * 3


def test_datasets_outside_training() -> None:
    keys = _keys(datasets=("d", "e"))
    experiment = _experiment(datasets={"d": "/n", "e": "/m"}, fewshot={"e.B": {"test": ["P1"]}})
    flags = assign_split(experiment, keys)
    assert (_flags_of(flags, keys, "A", "P1", "e") == 0).all()
    assert (_flags_of(flags, keys, "A", CONTROL, "e") == 0).all()
    assert (_flags_of(flags, keys, "B", "P1", "e") == Split.TEST).all()
    assert (_flags_of(flags, keys, "B", "P2", "e") == Split.TRAIN).all()


def test_held_out_cells_of_training_perturbations_validate() -> None:
    keys = _keys(cells=10)
    flags = assign_split(_experiment(prepare={"holdout_cells": 0.3}, zeroshot={"d.B": "test"}), keys)
    for pert in ("P1", "P2", "P3"):
        assert sorted(_flags_of(flags, keys, "A", pert)) == [1] * 7 + [2] * 3
    assert sorted(_flags_of(flags, keys, "A", CONTROL)) == [1] * 9 + [2]
    few = _keys(cells=1, contexts=("A",))
    alone = _experiment(prepare={"holdout_cells": 0.9, "val_controls": 0.0})
    assert (assign_split(alone, few) == Split.TRAIN).all()


HELD = st.lists(st.sampled_from(["P1", "P2"]), unique=True)


@settings(deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    cells=st.integers(4, 9),
    val=HELD,
    test=HELD,
    holdout=st.sampled_from([0.0, 0.2, 0.7]),
    zeroshot=st.sampled_from([{}, {"d.B": "test"}, {"d.B": "val"}]),
)
def test_splits_are_disjoint_and_do_not_depend_on_order(
    seed: int, cells: int, val: list[str], test: list[str], holdout: float, zeroshot: dict[str, str]
) -> None:
    keys = _keys(cells=cells)
    held = {"d.A": {"val": val, "test": test}} if val or test else {}
    experiment = _experiment(fewshot=held, zeroshot=zeroshot, prepare={"seed": seed, "holdout_cells": holdout})
    flags = assign_split(experiment, keys)
    order = np.random.default_rng(seed).permutation(len(flags))
    assert np.array_equal(assign_split(experiment, _permuted(keys, order)), flags[order])
    both = {pert for pert in val if pert in test}
    for cell, flag in enumerate(flags):
        pert, context = keys.perts[keys.pert_codes[cell]], keys.contexts[keys.context_codes[cell]]
        assert flag in ((6,) if context == "A" and pert in both else (1, 2, 4))
    for context in ("A", "B"):
        controls, perturbed = (
            _flags_of(flags, keys, context, CONTROL),
            flags[keys.context_codes == keys.contexts.index(context)],
        )
        assert (controls & Split.TRAIN).any()
        assert (controls == Split.VAL).any() == bool((perturbed & Split.VAL).any())
        assert (controls == Split.TEST).any() == bool((perturbed & Split.TEST).any())


def test_another_seed_draws_other_controls() -> None:
    keys = _keys(cells=40)

    def held(seed: int) -> list[int]:
        flags = assign_split(_experiment(zeroshot={"d.B": "test"}, prepare={"seed": seed}), keys)
        return np.flatnonzero((flags == Split.TEST) & (keys.pert_codes == 3)).tolist()

    assert held(0) == held(0)
    assert held(0) != held(1)


def test_names_that_repeat_in_a_file_are_told_apart() -> None:
    keys = _keys(cells=20, contexts=("A",))
    keys.names[:] = "cell"
    flags = assign_split(_experiment(prepare={"holdout_cells": 0.5}), keys)
    assert sorted(_flags_of(flags, keys, "A", "P1")) == [1] * 10 + [2] * 10
    assert keys.occurrences().tolist() == list(range(80))


def test_what_is_held_out_must_be_there() -> None:
    experiment = _experiment(
        zeroshot={"d.b": "test"}, fewshot={"d.A": {"val": ["p1", "P2"], "test": ["TP53"]}, "d.C": {"val": ["P1"]}}
    )
    with pytest.raises(DataError) as caught:
        assign_split(experiment, _keys())
    found = [str(problem) for problem in caught.value.problems]
    assert found == [
        '[zeroshot] "d.b": no cell of the data is of this dataset and cell type; there is d.B',
        '[fewshot] "d.C": no cell of the data is of this dataset and cell type; there is d.A, d.B',
        "[fewshot.\"d.A\"] val: no cell of d.A has the perturbation 'p1'; did you mean 'P1'?",
        "[fewshot.\"d.A\"] test: no cell of d.A has the perturbation 'TP53'; remove it",
    ]


@pytest.mark.parametrize("label", ["non_targeting", "Non-Targeting", "NTC", "ctrl"])
def test_a_missing_control_label_suggests_what_is_there(label: str) -> None:
    with pytest.raises(DataError) as caught:
        assign_split(_experiment(), _keys(perts=("P1", label)))
    assert [problem.place for problem in caught.value.problems] == ["d.A", "d.B"]
    assert f"did you mean {label!r}? set columns.control" in str(caught.value)


def test_nothing_left_to_train_is_an_error() -> None:
    with pytest.raises(DataError, match="no perturbed cell is left to train on"):
        assign_split(_experiment(zeroshot={"d.A": "val", "d.B": "test"}), _keys())
    with pytest.raises(DataError, match="no perturbed cell is left to train on"):
        assign_split(_experiment(training={}), _keys())


def test_too_few_controls_is_an_error() -> None:
    keys = _keys(cells=2, contexts=("A",))
    with pytest.raises(DataError, match=r"d.A: 2 control cells are too few to train, validate \(1\) and test \(1\)"):
        assign_split(_experiment(fewshot={"d.A": {"val": ["P1"], "test": ["P2"]}}), keys)


def test_a_context_of_controls_alone_is_kept_for_its_controls() -> None:
    keys = _keys()
    only = ~((keys.context_codes == 1) & (keys.pert_codes != 3))
    some = _permuted(keys, np.flatnonzero(only))
    flags = assign_split(_experiment(zeroshot={"d.B": "test"}), some)
    assert (_flags_of(flags, some, "B", CONTROL) == Split.TRAIN).all()
