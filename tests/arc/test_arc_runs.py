"""Imported runs are runs; exported ones give arc-state the same numbers; names that do not match are refused."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from unittest import mock

import anndata as ad
import numpy as np
import pytest
import torch

from arc_oracle import GENES, HVGS, OPTIONS
from arc_peer import arc_runs, call_oracle, has_decoder, require_arc_version, require_same_output, run_of
from pertcast.arc import convert_run, read_arc_folder
from pertcast.arc.import_export import export_run, import_run
from pertcast.config import load_experiment, rung_overrides
from pertcast.data.features import PertFeatures, open_features, save_features
from pertcast.data.prepare import prepare
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import CheckpointError, DataError
from pertcast.files.artefacts import read_manifest, verify_artefact
from pertcast.generate import generate
from pertcast.generate.predict import match_total
from pertcast.models.run_folder import Run, open_run, save_run
from pertcast.models.spec import StateSpec
from pertcast.models.state import StateTransition
from pertcast.progress import SILENT
from pertcast.train import train
from workspace import Workspace, make_workspace

__all__ = ["arc_runs"]

# 0.9.1 cannot load a network without a decoder's settings, which its own always have; those between were not tried
EXPORTED_FOR = (0, 9, 32)


def import_option(arc_runs: Path, name: str, tmp_path: Path) -> Path:
    for file, names in (("genes.txt", GENES), ("hvgs.txt", HVGS)):
        (tmp_path / file).write_text("".join(f"{gene}\n" for gene in names))
    return import_run(
        run_of(arc_runs, name), tmp_path / "run", genes=tmp_path / "genes.txt", hvgs=tmp_path / "hvgs.txt"
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_an_imported_run_opens_and_gives_arc_states_output(arc_runs: Path, name: str, tmp_path: Path) -> None:
    folder = read_arc_folder(run_of(arc_runs, name))
    if name == "embedding" and has_decoder(folder):
        pytest.skip("this version of arc-state trains a decoder that embeddings do not go through")
    path = import_option(arc_runs, name, tmp_path)
    assert verify_artefact(path) == []
    run = open_run(path)
    require_same_output(run.model(), arc_runs / name)
    assert (run.perts, run.batches) == (("G1", "G2", "G3", "non-targeting"), ("b1", "b2"))
    np.testing.assert_equal(open_features(path / "features").of(run.perts), np.eye(4))
    wide = name in {"genes", "all_of_genes", "all_decoded", "embedding_to_all"} or (
        name == "all_of_hvg" and has_decoder(folder)
    )
    assert run.genes == (GENES if wide else () if name == "embedding" else HVGS)
    assert run.experiment["model"]["input"] == (
        "obsm:X_emb" if "embedding" in name else "genes" if "genes" in name else "hvg"
    )


def test_exported_runs_give_arc_state_the_same_numbers(arc_runs: Path, tmp_path: Path) -> None:
    require_arc_version(*EXPORTED_FOR)
    names = [name for name in OPTIONS if (arc_runs / name / "out.npz").is_file()]
    exported = []
    for name in names:
        (tmp_path / name).mkdir()
        exported.append(export_run(import_option(arc_runs, name, tmp_path / name), tmp_path / name / "arc"))
    call_oracle("forward", *exported)
    for name, path in zip(names, exported, strict=True):
        before, after = np.load(arc_runs / name / "out.npz"), np.load(path / "out.npz")
        for key in after.files:
            np.testing.assert_allclose(after[key], before[key], atol=1e-5, rtol=1e-5, err_msg=f"{name} {key}")
        require_same_output(convert_run(read_arc_folder(path)).model(), path)


SPEC = StateSpec(
    input_dim=3, output_dim=3, pert_dim=2, num_genes=3, output_space="gene", set_size=4, hidden=8, layers=1, heads=2,
    head_dim=4, feedforward=8, encoder_layers=2, decoder_layers=2, num_batches=2,
)  # fmt: skip


def write_imported(workspace: Workspace, **changes: object) -> Path:
    """Write a run as an import makes it: three of the store's genes in another order, batches in another order."""
    values: dict[str, object] = {
        "path": workspace.folder / "imported",
        "spec": SPEC,
        "experiment": {
            "datasets": {"imported": "elsewhere"},
            "model": {"input": "hvg"},
            "generate": {"unpredicted_genes": "control"},
            "submission": {
                "targets": str(workspace.targets),
                "rules": {"num_genes": 20, "num_targets": 3, "max_cells": 120},
            },
        },
        "genes": ("G7", "G2", "G11"),
        "output_genes": np.arange(3),
        "hvg": np.arange(3),
        "perts": ("non-targeting", "G1"),
        "contexts": (),
        "batches": ("b2", "b1"),
        "control": "non-targeting",
        "target_sum": None,
        "scale": "log1p",
        "store_path": workspace.folder,
        "store_fingerprint": "",
        "step": 1,
    }
    run = Run(**(values | changes))  # type: ignore[arg-type]
    features = PertFeatures(("non-targeting", "G1"), np.eye(2, dtype=np.float32), "onehot", "non-targeting", "a test")
    save_features(features, run.path / "features")
    save_run(run, StateTransition(run.network).state_dict(), inputs={})
    return run.path


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = make_workspace(tmp_path / "workspace")
    workspace.targets.write_text("target_gene,n_cells,median_umi_per_cell\nG1,30,500\n")
    prepare(load_experiment(workspace.experiment), workspace.folder / "store")
    return workspace


OVERRIDES = ("submission.rules.num_targets=1", "generate.cells=model")


def test_an_imported_run_reads_and_writes_genes_and_batches_by_name(workspace: Workspace) -> None:
    path, store = write_imported(workspace), Store.open(workspace.folder / "store")
    parts = generate(path, workspace.folder / "parts", store_path=store.path, overrides=OVERRIDES)
    cells = ad.read_h5ad(parts / "H1" / "G1.h5ad")
    assert list(cells.var_names) == list(store.genes)
    found = cells[:, ["G7", "G2", "G11"]].X.toarray()
    others = cells[:, [gene for gene in store.genes if gene not in ("G7", "G2", "G11")]]
    every = store.log1p(store.rows(split=Split.TRAIN, pert=store.control_code))
    rest = every[:, [store.genes.index(gene) for gene in others.var_names]]
    rows = [int(np.abs(rest - cell).sum(1).argmin()) for cell in others.X.toarray()]
    controls = every[rows][:, [store.genes.index(gene) for gene in ("G7", "G2", "G11")]]
    codes = store.batch_codes[store.rows(split=Split.TRAIN, pert=store.control_code)][rows]
    batch = torch.tensor([("b2", "b1").index(store.batches[code]) for code in codes])
    with torch.inference_mode():
        expected = open_run(path).model()(
            torch.from_numpy(controls[:28]).reshape(7, 4, 3),
            torch.tensor([[0.0, 1.0]]).expand(7, -1),
            batch[:28].reshape(7, 4),
        )
    np.testing.assert_allclose(found[:28], expected.log1p_BSG.flatten(0, 1), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"genes": ("G7", "G2", "Q11")}, "1 of the 3 genes of the network are not there: 'Q11'"),
        ({"batches": ("b2", "b9")}, "1 batches of control cells are not known to the network: 'b1'"),
        ({"control": "DMSO"}, "its control label is 'DMSO', the store's is 'non-targeting'"),
    ],
)
def test_names_that_do_not_match_are_refused(workspace: Workspace, changes: dict[str, object], message: str) -> None:
    path = write_imported(workspace, **changes)
    with pytest.raises(CheckpointError, match="does not fit the imported run") as caught:
        generate(path, workspace.folder / "parts", store_path=workspace.folder / "store", overrides=OVERRIDES)
    assert message in str(caught.value)


def test_an_unknown_target_is_named_and_never_filled(workspace: Workspace) -> None:
    workspace.targets.write_text("target_gene,n_cells,median_umi_per_cell\nG3,30,500\n")
    path = write_imported(workspace)
    with pytest.raises(DataError, match="'G3': it has no feature"):
        generate(path, workspace.folder / "parts", store_path=workspace.folder / "store", overrides=OVERRIDES)


def test_cells_are_normalised_to_the_total_of_an_imported_run(workspace: Workspace, tmp_path: Path) -> None:
    given = ("generate.cells=model", *OVERRIDES)
    store = Store.open(workspace.folder / "store")
    assert store.target_sum is not None
    unknown = generate(write_imported(workspace), tmp_path / "unknown", store_path=store.path, overrides=given)
    assert any("normalised to is unknown" in note for note in read_manifest(unknown).notes)
    ten = 10 * store.target_sum
    path = write_imported(workspace, path=tmp_path / "ten", target_sum=ten)
    parts = generate(path, tmp_path / "parts", store_path=store.path, overrides=given)
    assert any(f"cells are normalised to {ten:,.6g}" in note for note in read_manifest(parts).notes)
    copied = [gene for gene in store.genes if gene not in ("G7", "G2", "G11")]
    before, after = (ad.read_h5ad(folder / "H1" / "G1.h5ad")[:, copied].X.toarray() for folder in (unknown, parts))
    np.testing.assert_allclose(np.expm1(after), 10 * np.expm1(before), rtol=1e-4)
    # another total makes parts anew
    again = write_imported(workspace, path=tmp_path / "ten", target_sum=2 * ten)
    generate(again, tmp_path / "parts", store_path=store.path, overrides=given)
    third = ad.read_h5ad(parts / "H1" / "G1.h5ad")[:, copied].X.toarray()
    np.testing.assert_allclose(np.expm1(third), 20 * np.expm1(before), rtol=1e-4)


def test_log1p_cells_of_another_total_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    store = Store.open(workspace.folder / "store")
    run = open_run(write_imported(workspace, target_sum=1e4))
    with pytest.raises(CheckpointError, match=r"normalised to 10,000, the store's log1p values to 500.*raw counts"):
        match_total(run, replace(store, scale="log1p", target_sum=500.0))
    with pytest.raises(CheckpointError, match="an unknown total"):
        match_total(run, replace(store, scale="log1p", target_sum=None))
    assert match_total(run, replace(store, scale="log1p", target_sum=1.005e4))[1] == []


def test_an_export_says_which_genes_x_hvg_holds_and_how_to_infer(workspace: Workspace, tmp_path: Path) -> None:
    path = write_imported(workspace, hvg=np.array([2, 0, 1]), target_sum=1e4)
    with mock.patch.object(SILENT, "note") as note:
        folder = export_run(path, tmp_path / "arc", progress=SILENT)
    assert (folder / "X_hvg_genes.csv").read_text().split() == ["G11", "G7", "G2"]
    said = " ".join(call.args[0] for call in note.call_args_list)
    assert f"state tx infer --model-dir {folder} --adata CELLS.h5ad --embed-key X_hvg" in said
    assert "a total of 10,000" in said


@pytest.mark.parametrize(
    "name", ["pseudobulk", "old_neuralot", "context_mean", "perturb_mean", "decoder_only", "embed_sum"]
)
def test_a_network_of_another_kind_is_refused_by_name(workspace: Workspace, tmp_path: Path, name: str) -> None:
    folder = export_run(write_imported(workspace), tmp_path / "arc")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("name: state", f"name: {name}"))
    with pytest.raises(CheckpointError, match=rf"model.name: expected a State Transition network.*{name}"):
        import_run(folder, tmp_path / "run")
    # the same network under the name that earlier versions gave it
    config.write_text(config.read_text().replace(f"name: {name}", "name: pertsets"))
    assert open_run(import_run(folder, tmp_path / "run", target_sum=1e4)).target_sum == 1e4


def test_an_imported_run_asks_for_a_store(workspace: Workspace) -> None:
    with pytest.raises(CheckpointError, match="give it with --store"):
        generate(write_imported(workspace), workspace.folder / "parts", overrides=OVERRIDES)


def test_a_folder_as_earlier_versions_wrote_it_reads_alike(workspace: Workspace, tmp_path: Path) -> None:
    """Before arc-state 0.10 one-hot maps were pickled, and the names of genes stood nowhere."""
    folder = export_run(write_imported(workspace), tmp_path / "arc")
    now = read_arc_folder(folder)
    for name in ("batch_onehot_map", "cell_type_onehot_map"):
        values = torch.load(folder / f"{name}.torch", weights_only=True)
        (folder / f"{name}.torch").unlink()
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(values))
    dims = pickle.loads((folder / "var_dims.pkl").read_bytes())
    del dims["gene_names"]
    (folder / "var_dims.pkl").write_bytes(pickle.dumps(dims))
    saved = torch.load(folder / "checkpoints" / "final.ckpt", weights_only=True)
    del saved["hyper_parameters"]["gene_names"]
    torch.save(saved, folder / "checkpoints" / "final.ckpt")
    (folder / "data_module.torch").write_bytes(b"never read")
    before = read_arc_folder(folder)
    assert (before.batches, before.contexts) == (now.batches, now.contexts) == (("b2", "b1"), ("context",))
    assert convert_run(before).spec == convert_run(now).spec == SPEC
    with pytest.raises(CheckpointError, match="--hvgs"):
        import_run(folder, tmp_path / "run")
    names = tmp_path / "hvgs.txt"
    names.write_text("G7\nG2\nG11\n")
    assert open_run(import_run(folder, tmp_path / "run", genes=names, hvgs=names)).genes == ("G7", "G2", "G11")


def write_trained(workspace: Workspace, out: Path) -> Path:
    """Train a network with all that arc-state's has not and that only training needs."""
    overrides = ("train.steps=2", "model.batch_embedding=true", *rung_overrides("c3"), "loss.de_head=learned")
    experiment = load_experiment(workspace.experiment, overrides)
    return train(experiment, workspace.folder / "store", out)


def test_what_only_training_needs_is_left_out_of_an_export_and_said(workspace: Workspace, tmp_path: Path) -> None:
    run = write_trained(workspace, tmp_path / "run")
    said: list[str] = []
    with mock.patch.object(type(SILENT), "note", lambda _, text: said.append(text)):
        folder = read_arc_folder(export_run(run, tmp_path / "arc"))
    assert ["DE head" in note for note in said if "left out" in note] == [True, False]
    assert "state tx infer" in said[-1]
    assert "unknown batch" in said[1]
    assert not [name for name in folder.weights if name.startswith("de_head.")]
    network, ours = convert_run(folder), open_run(run).model()
    assert (network.spec.num_batches, ours.spec.num_batches) == (2, 3)
    inputs = torch.rand(2, 8, 20), torch.eye(4)[:2], torch.tensor([[0, 1] * 4] * 2)
    with torch.inference_mode():
        torch.testing.assert_close(network.model()(*inputs).log1p_BSG, ours(*inputs).log1p_BSG)


def test_arc_state_reads_an_exported_run_of_ours(workspace: Workspace, tmp_path: Path) -> None:
    require_arc_version(*EXPORTED_FOR)
    folder = export_run(write_trained(workspace, tmp_path / "run"), tmp_path / "arc")
    call_oracle("forward", folder)
    require_same_output(open_run(tmp_path / "run").model(), folder)


def test_export_and_reading_it_back_is_the_identity(workspace: Workspace, tmp_path: Path) -> None:
    path = write_imported(workspace)
    folder = read_arc_folder(export_run(path, tmp_path / "arc"))
    network = convert_run(folder)
    assert network.spec == SPEC
    for name, value in open_run(path).model().state_dict().items():
        assert torch.equal(network.weights[name], value)
    assert folder.batches == ("b2", "b1")
    with pytest.raises(DataError, match="it exists already"):
        export_run(path, tmp_path / "arc")
