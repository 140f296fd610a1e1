"""Every defect of what a user brings gives exit code 1, one message with place and remedy, and no output.

Each case spoils one thing of a small experiment that works, and names the command that must refuse it.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import torch
from scipy import sparse

from conftest import SMALL_GENES, write_small_h5ad
from pertcast.cli.app import main
from workspace import Workspace, make_workspace

Spoil = Callable[[Workspace], None]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """An experiment that went through, never changed: cases copy it."""
    workspace = make_workspace(tmp_path_factory.mktemp("finished") / "w")
    with pytest.raises(SystemExit) as caught:
        main(["run", str(workspace.experiment), "--out", str(workspace.out)])
    assert caught.value.code == 0
    yield workspace
    shutil.rmtree(workspace.folder)


def edit_text(name: str, old: str, new: str) -> Spoil:
    def spoil(workspace: Workspace) -> None:
        path = workspace.folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return spoil


def add_text(name: str, text: str) -> Spoil:
    def spoil(workspace: Workspace) -> None:
        with (workspace.folder / name).open("a") as stream:
            stream.write(text)

    return spoil


def write_text(name: str, text: str) -> Spoil:
    return lambda workspace: void((workspace.folder / name).write_text(text))


def void(_value: object) -> None:
    return None


def edit_cells(change: Callable[[ad.AnnData], ad.AnnData | None], *, prediction: bool = False) -> Spoil:
    """Change the training file, or the prediction."""

    def spoil(workspace: Workspace) -> None:
        path = workspace.out / "prediction.h5ad" if prediction else workspace.data
        cells = ad.read_h5ad(path)
        changed = change(cells)
        (cells if changed is None else changed).write_h5ad(path)

    return spoil


def edit_h5(change: Callable[[Any], None], *, prediction: bool = False) -> Spoil:
    def spoil(workspace: Workspace) -> None:
        with h5py.File(workspace.out / "prediction.h5ad" if prediction else workspace.data, "r+") as file:
            change(file)

    return spoil


def set_value(value: float, row: int = 5, column: int = 3) -> Callable[[ad.AnnData], None]:
    def change(cells: ad.AnnData) -> None:
        matrix = cells.X.tolil()
        matrix[row, column] = value
        cells.X = matrix.tocsr()

    return change


def rename_label(column: str, old: str, new: str) -> Callable[[ad.AnnData], None]:
    def change(cells: ad.AnnData) -> None:
        cells.obs[column] = cells.obs[column].astype(str).replace(old, new).astype("category")

    return change


def set_dataset(name: str, index: int, value: float) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        file[name][index] = value

    return change


def log1p_some_rows(cells: ad.AnnData) -> None:
    dense = cells.X.toarray()
    dense[10:20] = np.log1p(dense[10:20] / 7)
    cells.X = sparse.csr_matrix(dense)


def counts_in_some_rows(cells: ad.AnnData) -> None:
    dense = cells.X.toarray()
    dense[4:7] = np.round(np.expm1(dense[4:7]))
    cells.X = sparse.csr_matrix(dense)


def first_gene_twice(cells: ad.AnnData) -> None:
    cells.var_names = ["G0", "G0", *SMALL_GENES[2:]]


def too_large(cells: ad.AnnData) -> None:
    cells.X = cells.X.astype(np.float64)
    cells.X.data[0] = 1e300


def misspell_gene(cells: ad.AnnData) -> None:
    cells.var_names = ["g0", *cells.var_names[1:]]


def features_file(name: str, write: Callable[[Path], None]) -> Spoil:
    def spoil(workspace: Workspace) -> None:
        write(workspace.folder / name)
        add_text("experiment.toml", f'\n[features]\nkind = "file"\npath = "{name}"\n')(workspace)

    return spoil


class Evil:
    """Would make a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(Path(__file__).parent / "evil-was-here"), "w")


def tensors(**shapes: int) -> dict[str, torch.Tensor]:
    return {name: torch.ones(width) for name, width in shapes.items()}


def flip_last_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-64:] = bytes(64)
    path.write_bytes(content)


def archive_with(name: str) -> Spoil:
    def spoil(workspace: Workspace) -> None:
        with tarfile.open(workspace.out / "prediction.vcc", "w") as tar:
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"evil"))

    return spoil


PREPARE = ("prepare", "experiment.toml", "--out", "new")
TRAIN = ("train", "experiment.toml", "--store", "out/store", "--out", "new")
GENERATE = ("generate", "out/run", "--targets", "targets.csv", "--out", "new")
ASSEMBLE = ("assemble", "out/parts", "--out", "new")
RULES = ("--genes", "genes.csv", "--targets", "targets.csv", "--rule", "num_genes=20", "--rule", "max_cells=120")
CHECK = ("check", "out/prediction.h5ad", *RULES)
PACK = ("pack", "out/prediction.h5ad", *RULES, "-o", "new")
UNPACK = ("unpack", "out/prediction.vcc", "-o", "new")

# id: (what is spoilt, the command that refuses, words of its message: the place and the remedy)
DEFECTS: dict[str, tuple[Spoil, tuple[str, ...], tuple[str, ...]]] = {
    "experiment: no TOML": (add_text("experiment.toml", "[["), PREPARE, ("experiment.toml", "not valid TOML")),
    "experiment: unknown key": (
        edit_text("experiment.toml", "steps = 12", "step = 12"),
        PREPARE,
        ("experiment.toml:24", "[train] step", "did you mean 'steps'"),
    ),
    "experiment: wrong type": (
        edit_text("experiment.toml", "steps = 12", 'steps = "12"'),
        PREPARE,
        ("[train] steps", "integer", "got '12'"),
    ),
    "experiment: unknown section": (
        edit_text("experiment.toml", "[columns]", "[column]"),
        PREPARE,
        ("[column]", "did you mean 'columns'"),
    ),
    "experiment: no such data": (edit_text("experiment.toml", '"data"', '"dat"'), PREPARE, ("small", "dat")),
    "experiment: empty data folder": (lambda workspace: workspace.data.unlink(), PREPARE, ("small", "data", "h5ad")),
    "experiment: held-out label in no file": (
        add_text("experiment.toml", '\n[fewshot."small.H1"]\nval = ["G22"]\n'),
        PREPARE,
        ("G22", "G2"),
    ),
    "experiment: held-out cell type in no file": (
        add_text("experiment.toml", '\n[zeroshot]\n"small.H2" = "test"\n'),
        PREPARE,
        ("H2", "H1"),
    ),
    "experiment: nothing left to train": (
        add_text("experiment.toml", '\n[fewshot."small.H1"]\ntest = ["G1", "G2", "G3"]\n'),
        PREPARE,
        ("train",),
    ),
    "experiment: unknown season": (
        edit_text("experiment.toml", "[submission]", '[submission]\nseason = "vcc2024"'),
        PREPARE,
        ("[submission]", "vcc2024", "vcc2025, vcc2026"),
    ),
    "experiment: heads do not divide": (
        edit_text("experiment.toml", "heads = 2", "heads = 3"),
        TRAIN,
        ("heads", "16", "3"),
    ),
    "data: not HDF5": (write_text("data/small.h5ad", "cells"), PREPARE, ("small.h5ad", "HDF5")),
    "data: truncated": (
        lambda workspace: void(workspace.data.write_bytes(workspace.data.read_bytes()[:5000])),
        PREPARE,
        ("small.h5ad", "truncated"),
    ),
    "data: no perturbation column": (
        edit_cells(lambda cells: void(cells.obs.rename(columns={"target_gene": "target_genes"}, inplace=True))),
        PREPARE,
        ("small.h5ad", "target_gene", "target_genes"),
    ),
    "data: no cell-type column named": (
        edit_text("experiment.toml", 'cell_type = "cell_type"\n', ""),
        PREPARE,
        ("columns.cell_type", "columns.context"),
    ),
    "data: no batch column": (
        edit_text("experiment.toml", 'batch = "batch"', 'batch = "gem_group"'),
        PREPARE,
        ("small.h5ad", "gem_group", "batch"),
    ),
    "data: no control cells": (
        edit_cells(rename_label("target_gene", "non-targeting", "non_targeting")),
        PREPARE,
        ("non-targeting", "non_targeting"),
    ),
    "data: NaN": (edit_cells(set_value(np.nan)), PREPARE, ("small.h5ad", "5", "G3")),
    "data: negative": (edit_cells(set_value(-2)), PREPARE, ("small.h5ad", "5", "G3")),
    "data: two scales in one file": (edit_cells(log1p_some_rows), PREPARE, ("small.h5ad", "counts", "log1p")),
    "data: two files on two scales": (
        lambda workspace: void(write_small_h5ad(workspace.data.with_name("other.h5ad"), scale="log1p")),
        PREPARE,
        ("small.h5ad", "other.h5ad", "counts", "log1p"),
    ),
    "data: scale against the experiment": (
        edit_text("experiment.toml", "[prepare]", '[prepare]\nscale = "log1p"'),
        PREPARE,
        ("small.h5ad", "counts", "prepare.scale"),
    ),
    "data: genes missing": (edit_cells(lambda cells: cells[:, 2:].copy()), PREPARE, ("small.h5ad", "G0", "G1")),
    "data: genes twice": (edit_cells(first_gene_twice), PREPARE, ("small.h5ad", "G0")),
    "data: broken indptr": (edit_h5(set_dataset("X/indptr", 3, 10**6)), PREPARE, ("small.h5ad", "indptr")),
    "data: column out of range": (edit_h5(set_dataset("X/indices", 7, 400)), PREPARE, ("small.h5ad", "indices")),
    "data: no cells": (edit_cells(lambda cells: cells[:0].copy()), PREPARE, ("small.h5ad",)),
    "features: a pickle with code": (
        features_file("f.pt", lambda path: torch.save({"G1": Evil()}, path)),
        TRAIN,
        ("f.pt",),
    ),
    "features: two widths": (
        features_file("f.pt", lambda path: torch.save(tensors(G1=4, G2=5, G3=4), path)),
        TRAIN,
        ("f.pt", "G2", "4", "5"),
    ),
    "features: NaN": (
        features_file(
            "f.npz", lambda path: np.savez(path, gene=np.array(["G1", "G2"]), embedding=np.full((2, 3), np.nan))
        ),
        TRAIN,
        ("f.npz", "G1"),
    ),
    "features: no numbers": (
        features_file("f.csv", lambda path: void(path.write_text("g,a\nG1,x\n"))),
        TRAIN,
        ("f.csv",),
    ),
    "features: unknown kind of file": (
        features_file("f.xlsx", lambda path: void(path.write_text(""))),
        TRAIN,
        (".pt",),
    ),
    "features: a target without one": (
        features_file("f.pt", lambda path: torch.save(tensors(G1=4), path)),
        TRAIN,
        ("G2", "G3", "features.missing"),
    ),
    "targets: no column": (
        edit_text("targets.csv", "target_gene", "gene"),
        GENERATE,
        ("targets.csv, line 1", "target_gene", "rename 'gene'"),
    ),
    "targets: twice": (add_text("targets.csv", "G1,5,500\n"), GENERATE, ("targets.csv, line 5", "line 2")),
    "targets: no number": (edit_text("targets.csv", "G1,30", "G1,many"), GENERATE, ("targets.csv, line 2", "'many'")),
    "targets: zero cells": (edit_text("targets.csv", "G1,30", "G1,0"), GENERATE, ("targets.csv, line 2", "at least 1")),
    "targets: the control label": (
        edit_text("targets.csv", "G1,", "non-targeting,"),
        GENERATE,
        ("targets.csv, line 2", "non-targeting", "num_controls"),
    ),
    "targets: empty": (write_text("targets.csv", ""), GENERATE, ("targets.csv", "empty")),
    "targets: not seen in training, one-hot": (edit_text("targets.csv", "G1,", "G7,"), GENERATE, ("G7", "features")),
    "targets: not there": (lambda workspace: workspace.targets.unlink(), GENERATE, ("targets.csv", "no such file")),
    "budget: too many controls": (
        lambda _workspace: None,
        (*GENERATE, "--set", "submission.num_controls=119", "--set", "submission.controls=predicted"),
        ("G1", "control cells", "at most"),
    ),
    "budget: more controls than there are": (
        lambda _workspace: None,
        (*GENERATE, "--set", "submission.num_controls=60"),
        ("60", "predicted"),
    ),
    "genes: one missing": (edit_text("genes.csv", "G7\n", ""), PREPARE, ("genes.csv", "20", "19")),
    "genes: twice": (edit_text("genes.csv", "G7\n", "G6\n"), PREPARE, ("genes.csv", "G6")),
    "genes: a header": (edit_text("genes.csv", "G0\n", "gene_name\nG0\n"), PREPARE, ("genes.csv", "gene_name")),
    "run: weights changed": (
        lambda workspace: flip_last_bytes(workspace.out / "run" / "weights.safetensors"),
        ("verify", "out/run"),
        ("weights.safetensors", "manifest"),
    ),
    "run: weights cut off": (
        lambda workspace: void((workspace.out / "run" / "weights.safetensors").write_bytes(b"123")),
        GENERATE,
        ("weights.safetensors",),
    ),
    "run: another store": (
        lambda workspace: main_ok("prepare", workspace, "--set", "prepare.num_hvgs=5"),
        (*GENERATE, "--store", "other"),
        ("other", "trained on"),
    ),
    "run: no run": (lambda _workspace: None, ("generate", "out/store", "--out", "new"), ("out/store",)),
    "parts: one is gone": (
        lambda workspace: (workspace.out / "parts" / "H1" / "G2.h5ad").unlink(),
        ASSEMBLE,
        ("G2.h5ad", "pertcast generate"),
    ),
    "prediction: not HDF5": (write_text("out/prediction.h5ad", "x"), CHECK, ("prediction.h5ad", "HDF5")),
    "prediction: a gene misspelt": (
        edit_cells(misspell_gene, prediction=True),
        PACK,
        ("prediction.h5ad", "'G0'", "'g0'"),
    ),
    "prediction: a gene is missing": (
        edit_cells(lambda cells: cells[:, 1:].copy(), prediction=True),
        PACK,
        ("G0", "20"),
    ),
    "prediction: no target_gene": (
        edit_cells(
            lambda cells: void(cells.obs.rename(columns={"target_gene": "gene"}, inplace=True)), prediction=True
        ),
        PACK,
        ("target_gene", "gene"),
    ),
    "prediction: control label misspelt": (
        edit_cells(rename_label("target_gene", "non-targeting", "non_targeting"), prediction=True),
        PACK,
        ("non-targeting", "non_targeting"),
    ),
    "prediction: invented target": (
        edit_cells(rename_label("target_gene", "G1", "g1"), prediction=True),
        PACK,
        ("g1", "G1"),
    ),
    "prediction: wrong number of cells": (
        edit_cells(lambda cells: cells[1:].copy(), prediction=True),
        PACK,
        ("G1", "29"),
    ),
    "prediction: more than float32 holds": (
        edit_cells(too_large, prediction=True),
        PACK,
        ("1 infinite value", "1e+300"),
    ),
    "prediction: NaN": (edit_cells(set_value(np.nan), prediction=True), PACK, ("5", "G3")),
    "prediction: negative": (edit_cells(set_value(-1), prediction=True), PACK, ("5", "G3")),
    "prediction: two scales": (edit_cells(counts_in_some_rows, prediction=True), PACK, ("4", "counts", "log1p")),
    "prediction: broken indptr": (edit_h5(set_dataset("X/indptr", 3, 10**6), prediction=True), PACK, ("indptr",)),
    "archive: truncated": (
        lambda workspace: void(
            (workspace.out / "prediction.vcc").write_bytes((workspace.out / "prediction.vcc").read_bytes()[:1500])
        ),
        UNPACK,
        ("prediction.vcc",),
    ),
    "archive: a member outside": (archive_with("../evil.h5ad"), UNPACK, ("prediction.vcc", "../evil.h5ad")),
    "archive: no archive": (write_text("out/prediction.vcc", "x" * 600), UNPACK, ("prediction.vcc",)),
}


def main_ok(command: str, workspace: Workspace, *options: str) -> None:
    """Prepare another store beside the experiment."""
    with pytest.raises(SystemExit) as caught:
        main([command, str(workspace.experiment), "--out", str(workspace.folder / "other"), *options])
    assert caught.value.code == 0


def test_there_are_at_least_thirty_defects_of_every_kind_of_input() -> None:
    kinds = {name.partition(":")[0] for name in DEFECTS}
    assert kinds >= {"experiment", "data", "features", "targets", "genes", "prediction"}
    assert len(DEFECTS) >= 30


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_one_clear_error_and_leaves_nothing(
    name: str, finished: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, command, words = DEFECTS[name]
    workspace = Workspace(tmp_path / "w")
    shutil.copytree(finished.folder, workspace.folder)
    monkeypatch.chdir(workspace.folder)
    spoil(workspace)
    before = listing(workspace.folder)
    capsys.readouterr()

    with pytest.raises(SystemExit) as caught:
        main(command)

    out, err = capsys.readouterr()
    said = err + (out if command[0] == "check" else "")
    assert caught.value.code == 1, said
    assert "Traceback" not in said
    for word in words:
        assert word in said, said
    assert listing(workspace.folder) == before
    assert not (Path(__file__).parent / "evil-was-here").exists()
