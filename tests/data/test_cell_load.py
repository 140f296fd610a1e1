"""Experiment files as cell-load's users write them give the same cells in train, val and test, or an error says why.

Each case has the perturbations that each split should have, worked out by hand. Where ``PERTCAST_CELL_LOAD_PYTHON``
names a Python that has cell-load, it is asked, too, cell by cell.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from conftest import write_small_h5ad
from pertcast.config import load_experiment
from pertcast.data.experiment import read_cells
from pertcast.data.split import Split, assign_split
from pertcast.errors import PertcastError

PERTS = ("G1", "G2", "G3")
ALL = frozenset(PERTS)


class Case(NamedTuple):
    """A file's text, and ``(file, cell type, perturbation)`` patterns of each split; "*" stands for all of them."""

    text: str
    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


CASES = {
    "one_folder": Case('[datasets]\nd = "data"\n[training]\nd = "train"\n', train=("* * *",)),
    "one_file": Case('[datasets]\nd = "data/ab.h5"\n[training]\nd = "train"\n', train=("ab.h5 * *",)),
    "braces": Case('[datasets]\nd = "data/{c,d}.h5"\n[training]\nd = "train"\n', train=("c.h5 * *", "d.h5 * *")),
    "spaces_in_braces": Case(
        '[datasets]\nd = "data/{c, d}.h5"\n[training]\nd = "train"\n', train=("c.h5 * *", "d.h5 * *")
    ),
    "star": Case('[datasets]\nd = "data/[cd].h5"\n[training]\nd = "train"\n', train=("c.h5 * *", "d.h5 * *")),
    "braces_of_folders": Case(
        '[datasets]\nd = "{more,less}"\n[training]\nd = "train"\n', train=("e.h5 * *", "f.h5 * *")
    ),
    "star_of_folders": Case('[datasets]\nd = "m*"\n[training]\nd = "train"\n', train=("e.h5 * *",)),
    "zeroshot_test": Case(
        '[datasets]\nd = "data/ab.h5"\n[training]\nd = "train"\n[zeroshot]\n"d.A" = "test"\n',
        train=("ab.h5 B *",),
        test=("ab.h5 A *",),
    ),
    "zeroshot_val_and_test": Case(
        '[datasets]\nd = "data"\n[training]\nd = "train"\n[zeroshot]\n"d.A" = "val"\n"d.B" = "test"\n',
        train=("c.h5 * *",),
        val=("ab.h5 A *", "d.h5 A *"),
        test=("ab.h5 B *",),
    ),
    "fewshot": Case(
        '[datasets]\nd = "data/ab.h5"\n[training]\nd = "train"\n[fewshot."d.A"]\nval = ["G1"]\ntest = ["G2"]\n',
        train=("ab.h5 A G3", "ab.h5 B *"),
        val=("ab.h5 A G1",),
        test=("ab.h5 A G2",),
    ),
    "fewshot_val_alone": Case(
        '[datasets]\nd = "data/ab.h5"\n[training]\nd = "train"\n[fewshot."d.B"]\nval = ["G1", "G3"]\n',
        train=("ab.h5 A *", "ab.h5 B G2"),
        val=("ab.h5 B G1", "ab.h5 B G3"),
    ),
    "fewshot_of_two": Case(
        '[datasets]\nd = "data/ab.h5"\n[training]\nd = "train"\n'
        '[fewshot."d.A"]\ntest = ["G1"]\n[fewshot."d.B"]\nval = ["G2"]\ntest = ["G3"]\n',
        train=("ab.h5 A G2", "ab.h5 A G3", "ab.h5 B G1"),
        val=("ab.h5 B G2",),
        test=("ab.h5 A G1", "ab.h5 B G3"),
    ),
    "zeroshot_and_fewshot": Case(
        '[datasets]\nd = "data/ab.h5"\n[training]\nd = "train"\n'
        '[zeroshot]\n"d.A" = "test"\n[fewshot."d.B"]\nval = ["G1"]\n',
        train=("ab.h5 B G2", "ab.h5 B G3"),
        val=("ab.h5 B G1",),
        test=("ab.h5 A *",),
    ),
    "two_datasets": Case(
        '[datasets]\none = "data/ab.h5"\ntwo = "data/{c,d}.h5"\n[training]\none = "train"\ntwo = "train"\n'
        '[zeroshot]\n"two.C" = "test"\n[fewshot."one.A"]\nval = ["G2"]\n',
        train=("ab.h5 A G1", "ab.h5 A G3", "ab.h5 B *", "d.h5 * *"),
        val=("ab.h5 A G2",),
        test=("c.h5 C *",),
    ),
    "not_in_training": Case(
        '[datasets]\none = "data/ab.h5"\ntwo = "data/c.h5"\n[training]\none = "train"\n[zeroshot]\n"two.C" = "test"\n',
        train=("ab.h5 * *",),
        test=("c.h5 C *",),
    ),
    "fewshot_over_files": Case(
        '[datasets]\nd = "data/{ab,d}.h5"\n[training]\nd = "train"\n[fewshot."d.A"]\ntest = ["G2"]\n',
        train=("ab.h5 A G1", "ab.h5 A G3", "ab.h5 B *", "d.h5 A G1", "d.h5 A G3"),
        test=("ab.h5 A G2", "d.h5 A G2"),
    ),
}
OURS = '[columns]\ncell_type = "cell_type"\nbatch = "batch"\n'
REFUSED = {
    "a missing alternative": (
        '[datasets]\nd = "data/{c,x}.h5"\n[training]\nd = "train"\n',
        "data/x.h5: no .h5 or .h5ad file",
    ),
    "a dataset that is not there": ('[datasets]\nd = "data"\n[training]\ne = "train"\n', "no such dataset"),
    "a cell type that is not there": (
        '[datasets]\nd = "data"\n[training]\nd = "train"\n[zeroshot]\n"d.Z" = "test"\n',
        "no cell of the data is of this dataset and cell type",
    ),
    "a perturbation that is not there": (
        '[datasets]\nd = "data"\n[training]\nd = "train"\n[fewshot."d.A"]\ntest = ["G9"]\n',
        "no cell of d.A has the perturbation 'G9'",
    ),
    "held out in both tables": (
        '[datasets]\nd = "data"\n[training]\nd = "train"\n[zeroshot]\n"d.A" = "test"\n[fewshot."d.A"]\nval = ["G1"]\n',
        "in both [zeroshot] and [fewshot]",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of files: two cell types in one, a cell type in two files, files in two folders."""
    root = tmp_path_factory.mktemp("cell_load")
    contexts = {"data/ab": ("A", "B"), "data/c": ("C",), "data/d": ("A",), "more/e": ("E",), "less/f": ("F",)}
    for number, (name, some) in enumerate(contexts.items()):
        path = root / f"{name}.h5"
        path.parent.mkdir(exist_ok=True)
        write_small_h5ad(path, contexts=some, cells_per_group=4, seed=number)
    for name, case in CASES.items():
        (root / f"{name}.toml").write_text(case.text)
    return root


def our_cells(folder: Path, name: str, *overrides: str) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Return ``file/cell`` names of the perturbed and of the control cells of each split."""
    path = folder / f"{name}_ours.toml"
    path.write_text(CASES[name].text + OURS)
    experiment = load_experiment(path, overrides)
    keys = read_cells(experiment).keys
    flags = assign_split(experiment, keys)
    is_control = np.array(keys.perts)[keys.pert_codes] == "non-targeting"
    found: list[dict[str, set[str]]] = []
    for kind in (~is_control, is_control):
        rows = {split.name.lower(): np.flatnonzero(kind & ((flags & split) > 0)) for split in Split if split.name}
        found.append(
            {
                split: {f"{keys.files[keys.file_codes[row]]}/{keys.names[row]}" for row in mine}
                for split, mine in rows.items()
            }
        )
    return found[0], found[1]


@pytest.mark.parametrize("name", CASES)
def test_each_split_has_the_perturbations_that_it_should(folder: Path, name: str) -> None:
    case = CASES[name]
    path = folder / f"{name}_ours.toml"
    path.write_text(case.text + OURS)
    experiment = load_experiment(path)
    keys = read_cells(experiment).keys
    flags = assign_split(experiment, keys)
    for split, patterns in ((Split.TRAIN, case.train), (Split.VAL, case.val), (Split.TEST, case.test)):
        wanted = [pattern.split() for pattern in patterns]
        for row in np.flatnonzero(np.array(keys.perts)[keys.pert_codes] != "non-targeting"):
            what = (
                keys.files[keys.file_codes[row]],
                keys.contexts[keys.context_codes[row]],
                keys.perts[keys.pert_codes[row]],
            )
            due = any(all(p in ("*", part) for p, part in zip(pattern, what, strict=True)) for pattern in wanted)
            assert bool(flags[row] & split) == due, (split, what)


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_what_cell_load_passes_over_in_silence_is_an_error(folder: Path, text: tuple[str, str]) -> None:
    path = folder / "refused.toml"
    path.write_text(text[0] + OURS)
    with pytest.raises(PertcastError) as caught:
        experiment = load_experiment(path)
        assign_split(experiment, read_cells(experiment).keys)
    assert text[1] in str(caught.value)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Return what cell-load says of every case."""
    python = os.environ.get("PERTCAST_CELL_LOAD_PYTHON")
    if not python:
        pytest.skip("PERTCAST_CELL_LOAD_PYTHON names no Python with cell-load (extra arc)")
    command = [
        python,
        str(Path(__file__).parents[1] / "cell_load_oracle.py"),
        *(str(folder / f"{name}.toml") for name in CASES),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, list[str]]] = json.loads(done.stdout[done.stdout.index("{") :])
    return {Path(name).stem: splits for name, splits in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_cell_load_puts_the_same_cells_into_each_split(
    folder: Path, theirs: dict[str, dict[str, list[str]]], name: str
) -> None:
    perturbed, controls = our_cells(folder, name, "prepare.controls=shared")
    for split in ("train", "val", "test"):
        assert perturbed[split] | controls[split] == set(theirs[name][split])
    disjoint, ours = our_cells(folder, name)
    assert disjoint == perturbed
    assert not ours["train"] & ours["val"]
    assert not ours["val"] & ours["test"]
    assert not ours["train"] & ours["test"]
