"""Whatever users bring ends in one clear line: odd files, odd terminals, folders that cannot be written, no memory."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from conftest import write_small_h5ad
from pertcast.config import FeaturesConfig, load_experiment
from pertcast.data.features import load_features, read_vectors
from pertcast.data.prepare import prepare
from pertcast.data.store import Store
from pertcast.errors import ConfigError, DataError
from pertcast.files.h5ad import open_h5ad
from pertcast.files.labels import too_long
from pertcast.files.season_lists import read_targets, read_written_genes, write_genes
from pertcast.pipeline import run_experiment
from pertcast.seasons import season
from workspace import Workspace, make_workspace

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><body>404</body></html>"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "w")


def run(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "pertcast", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, check=False)


ODD_TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float16": lambda value: value.half(),
    "bfloat16": lambda value: value.bfloat16(),
    "float64": lambda value: value.double(),
    "whole": lambda value: value.int(),
    "gradient": lambda value: value.clone().requires_grad_(),
    "sparse": lambda value: value.to_sparse(),
    "negative view": lambda value: torch.complex(torch.zeros(3), -value).conj().imag,
    "float8": lambda value: value.to(torch.float8_e4m3fn),
    "quantized": lambda value: torch.quantize_per_tensor(value, 0.5, 0, torch.qint8),
}
NO_VECTORS: dict[str, object] = {
    "complex": torch.ones(3, dtype=torch.complex64),
    "meta": torch.ones(3, device="meta"),
    "scalar": torch.tensor(1.0),
    "matrix": torch.ones(2, 3),
    "nested": {"mean": torch.ones(3)},
    "text": "text",
    "none": None,
}


@pytest.mark.parametrize("name", ODD_TENSORS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_odd_tensor_is_read(tmp_path: Path, name: str) -> None:
    value = torch.tensor([1.0, 2.0, -3.0])
    torch.save({"A": ODD_TENSORS[name](value), "B": torch.ones(3)}, tmp_path / "f.pt")
    np.testing.assert_array_equal(read_vectors(tmp_path / "f.pt")["A"], value.numpy())


@pytest.mark.parametrize("name", NO_VECTORS)
def test_what_is_no_vector_is_named(tmp_path: Path, name: str) -> None:
    torch.save({"A": NO_VECTORS[name], "B": torch.ones(3)}, tmp_path / "f.pt")
    with pytest.raises(DataError, match="no vector of numbers: A"):
        read_vectors(tmp_path / "f.pt")


@pytest.mark.parametrize("content", [LFS, PAGE], ids=["lfs", "page"])
@pytest.mark.parametrize("suffix", [".pt", ".npz", ".parquet", ".csv", ".h5ad"])
def test_a_file_that_is_something_else_is_named_for_what_it_is(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"f{suffix}"
    path.write_bytes(content)
    wanted = "a Git LFS pointer.*run `git lfs pull`" if content == LFS else "a web page; download the file itself"
    with pytest.raises(DataError, match=wanted):
        if suffix == ".h5ad":
            with open_h5ad(path):
                pass
        else:
            read_vectors(path)
    with pytest.raises(DataError, match=wanted):
        read_targets(path, season("vcc2025"))


def test_a_compressed_file_is_named(tmp_path: Path) -> None:
    path = write_small_h5ad(tmp_path / "a.h5ad")
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match="compressed by gzip"), open_h5ad(path):
        pass


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_lists_of_spreadsheets_are_read(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "targets.csv"
    path.write_text(f"\ufefftarget_gene{mark}n_cells\r\nTP53{mark}5\r\nMYC{mark}7\r\n")
    found = read_targets(path, season("vcc2025", {"num_targets": 2}))
    assert found.requested() == {"TP53": 5, "MYC": 7}
    (tmp_path / "f.csv").write_text(f"gene{mark}a{mark}b\nTP53{mark}1.5{mark}2\n")
    assert read_vectors(tmp_path / "f.csv")["TP53"].tolist() == [1.5, 2]


def test_a_toml_with_a_byte_order_mark_is_read_and_utf16_is_named(workspace: Workspace) -> None:
    text = workspace.experiment.read_text()
    workspace.experiment.write_text(text, encoding="utf-8-sig")
    load_experiment(workspace.experiment)
    workspace.experiment.write_text(text, encoding="utf-16")
    with pytest.raises(ConfigError, match="expected a TOML text file"):
        load_experiment(workspace.experiment)


@pytest.mark.parametrize("index", ["plain", "named", "categorical", "string"])
def test_names_in_a_tables_index_are_read(tmp_path: Path, index: str) -> None:
    names = pd.Index(["A", "B"], name="gene" if index == "named" else None)
    if index == "categorical":
        names = pd.CategoricalIndex(names)
    if index == "string":
        names = names.astype("string")
    pd.DataFrame(np.eye(2), index=names, columns=["x", "y"]).to_parquet(tmp_path / "f.parquet")
    assert read_vectors(tmp_path / "f.parquet")["B"].tolist() == [0, 1]


def test_a_feature_under_a_near_name_is_hinted_and_zeros_are_no_feature(workspace: Workspace, tmp_path: Path) -> None:
    store = Store.open(prepare(load_experiment(workspace.experiment), tmp_path / "store"))
    vectors = np.array([[1.0, 0], [0, 0], [0, 1]])
    np.savez(tmp_path / "f.npz", gene=np.array(["g1", "G2", "G3"]), embedding=vectors)
    config = FeaturesConfig.model_validate({"kind": "file", "path": tmp_path / "f.npz"}, strict=False)
    with pytest.raises(DataError) as caught:
        load_features(config, store)
    one, two = caught.value.problems
    assert (one.place, two.place) == ("'G1'", "'G2'")
    assert "did you mean 'g1'?" in one.remedy
    assert "all zeros" in two.message
    filled = load_features(config.model_copy(update={"missing": "mean"}), store).filled
    assert set(filled) == {"G1", "G2"}


GENES = ("A,B", 'say "x"', "name", " padded", "two\nlines", "gene_name", *(f"G{number}" for number in range(14)))


def test_genes_of_any_name_go_through_to_the_prediction(workspace: Workspace, tmp_path: Path) -> None:
    write_genes(tmp_path / "genes.csv", GENES)
    assert read_written_genes(tmp_path / "genes.csv") == GENES
    cells = ad.read_h5ad(workspace.data)
    cells.var_names = list(GENES)
    cells.write_h5ad(workspace.data)
    text = workspace.experiment.read_text().replace('genes = "genes.csv"\n', "")
    workspace.experiment.write_text(text)
    from pertcast.generate import generate
    from pertcast.submission.assemble import assemble
    from pertcast.train import train

    experiment = load_experiment(workspace.experiment, ["model.kind=mean"])
    made = train(experiment, prepare(experiment, tmp_path / "store"), tmp_path / "run")
    prediction = assemble(generate(made, tmp_path / "parts"), tmp_path / "p.h5ad")
    assert tuple(ad.read_h5ad(prediction).var_names) == GENES


@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "ascii"])
def test_a_terminal_that_knows_few_letters_is_no_error(workspace: Workspace, encoding: str) -> None:
    done = run("prepare", workspace.experiment, "--out", "Größe-基", cwd=workspace.folder, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr


def test_no_folder_that_can_be_written_is_no_error(workspace: Workspace, tmp_path: Path) -> None:
    """Without a home to write to, compiled code is cached in the temporary folder."""
    code = (
        "import os, tempfile;"
        "os.access = lambda *_: False; from pertcast.stats import groups; import numba, numpy as np;"
        "assert numba.config.CACHE_DIR.startswith(tempfile.gettempdir()), numba.config.CACHE_DIR;"
        "from scipy import sparse; from pertcast.stats.groups import group_cells, group_means;"
        "print(group_means(group_cells(sparse.csr_matrix(np.eye(2)), np.zeros(2, int)))[0])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    environment |= {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("pertcast-numba-*"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.hidden=4000000", "not enough memory"),
        ("train.accelerator=tpu", "accelerator"),
        ("train.accelerator=nonsense", "accelerator"),
    ],
)
def test_what_the_machine_does_not_have_is_one_line(workspace: Workspace, override: str, said: str) -> None:
    done = run("run", workspace.experiment, "--out", "out", "--set", override, cwd=workspace.folder)
    assert done.returncode == 1
    text = done.stderr.decode()
    assert "Traceback" not in text
    assert said in text.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "experiment.toml", "--store", "none", "--out", "run"),
        ("generate", "none", "--out", "parts"),
        ("assemble", "none", "--out", "p.h5ad"),
        ("calibrate", "none"),
        ("report", "none"),
        ("verify", "none"),
        ("export", "none", "--out", "state"),
        ("import", "none", "--out", "run"),
        ("adapt", "none", "experiment.toml", "--out", "run"),
        ("unpack", "none.vcc", "-o", "p.h5ad"),
        ("score", "none.h5ad", "none.h5ad"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_input_that_is_not_there_is_one_line(workspace: Workspace, arguments: tuple[str, ...]) -> None:
    done = run(*arguments, cwd=workspace.folder)
    assert done.returncode == 1
    text = done.stderr.decode()
    assert "Traceback" not in text
    assert "none" in text


def test_a_target_that_is_too_long_for_a_file_is_said_before_training(workspace: Workspace) -> None:
    long = "+".join(f"GENE{number:02d}" for number in range(45))
    workspace.targets.write_text(f"target_gene,n_cells\nG1,30\n{long},41\n")
    with pytest.raises(DataError, match="too long for a file name"):
        run_experiment(workspace.experiment, workspace.out, overrides=["submission.rules.num_targets=2"])
    assert not workspace.out.exists()


def test_the_longest_label_that_is_allowed_can_be_written(workspace: Workspace) -> None:
    long = "T" * (255 - 32 - len(".h5ad"))
    assert too_long(long) is None
    assert too_long(f"{long}T") is not None
    workspace.targets.write_text(f"target_gene,n_cells\nG1,30\n{long},41\n")
    overrides = ["submission.rules.num_targets=2", "features.missing=mean", "train.steps=1", "generate.cells=donors"]
    assert run_experiment(workspace.experiment, workspace.out, overrides=overrides).report.ok


def test_hidden_files_of_macos_are_no_data(workspace: Workspace) -> None:
    (workspace.data.parent / "._small.h5ad").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    workspace.data.rename(workspace.data.with_suffix(".H5AD"))
    store = Store.open(prepare(load_experiment(workspace.experiment), workspace.out / "store"))
    assert store.files == ("small.H5AD",)
