"""Control cells that are encoded once: the same predictions, each control cell read once, in whatever order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import torch
from torch import nn

import pertcast.generate.encoded
from pertcast.config import load_experiment
from pertcast.data.features import PertFeatures, save_features
from pertcast.data.store import Store, prepare
from pertcast.generate import generate
from pertcast.generate.encoded import EncodedControls
from pertcast.models.checkpoint import Run, save_run
from pertcast.models.folded import FoldedNetwork, can_fold
from pertcast.models.spec import StateSpec
from pertcast.models.state import StateTransition
from workspace import Workspace, make_workspace

GENES = 20
FORM: dict[str, Any] = {
    "input_dim": GENES, "output_dim": GENES, "pert_dim": 2, "num_genes": GENES, "output_space": "all", "set_size": 4,
    "hidden": 8, "layers": 1, "heads": 2, "head_dim": 4, "feedforward": 8, "encoder_layers": 2, "decoder_layers": 2,
    "num_batches": 2, "bottleneck": True, "residual": True,
}  # fmt: skip


def network_of(**changes: Any) -> StateTransition:
    network = StateTransition(StateSpec(**{**FORM, **changes})).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if isinstance(parameter, nn.Parameter) and parameter.dim() == 1:
                parameter.add_(0.1)
    return network


@pytest.mark.parametrize("changes", [{}, {"decoder_layers": 1}, {"num_batches": 0}, {"num_contexts": 3}])
def test_a_folded_network_predicts_what_the_network_predicts(changes: dict[str, Any]) -> None:
    network, random = network_of(**changes), torch.Generator().manual_seed(1)
    control_BSI = torch.rand(3, 4, GENES, generator=random)
    others = (
        torch.rand(3, 2, generator=random),
        torch.randint(0, 2, (3, 4), generator=random) if network.batch_encoder is not None else None,
        torch.tensor([0, 2, 1]) if network.context_encoder is not None else None,
    )
    with torch.inference_mode():
        expected = network(control_BSI, *others).log1p_BSG
    folded = FoldedNetwork(network)
    encoded = folded.encode(control_BSI.flatten(0, 1))
    assert encoded.shape == (12, folded.width) == (12, 8 + 2)
    found = folded.predict(encoded.reshape(3, 4, -1), *others)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"bottleneck": False}, {"residual": False}, {"output_space": "latent"}])
def test_other_networks_are_left_as_they_are(changes: dict[str, Any]) -> None:
    assert can_fold(StateSpec(**FORM))
    assert not can_fold(StateSpec(**{**FORM, **changes}))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = make_workspace(tmp_path_factory.mktemp("folded") / "w")
    prepare(load_experiment(workspace.experiment), workspace.folder / "store")
    return workspace


@pytest.fixture(scope="module")
def store(workspace: Workspace) -> Store:
    return Store.open(workspace.folder / "store")


def test_cells_are_encoded_in_fixed_blocks_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pertcast.generate.encoded, "_BLOCK", 8)
    controls = np.flatnonzero(store.pert_codes == store.control_code)
    read: list[list[int]] = []

    def rows_of(rows: np.ndarray) -> torch.Tensor:
        read.append(rows.tolist())
        return torch.from_numpy(store.log1p(rows))

    folded = FoldedNetwork(network_of())
    forward, backward = (EncodedControls(store, folded, rows_of) for _ in range(2))
    wanted = controls[[9, 2, 9, len(controls) - 1]]
    found = forward.of(wanted)
    assert read == [controls[:8].tolist(), controls[8:16].tolist(), controls[(len(controls) - 1) // 8 * 8 :].tolist()]
    torch.testing.assert_close(found, folded.encode(torch.from_numpy(store.log1p(wanted))), atol=1e-6, rtol=1e-6)
    backward.of(controls[::-1])
    assert torch.equal(backward.of(wanted), found)
    assert torch.equal(forward.of(wanted), found)
    with pytest.raises(IndexError, match="expected rows of control cells"):
        forward.of(np.flatnonzero(store.pert_codes != store.control_code)[:1])


def test_it_pays_where_cells_outnumber_the_controls_and_these_fit(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_controls = int((store.pert_codes == store.control_code).sum())
    spec = StateSpec(**FORM)
    assert EncodedControls.pays(spec, store, num_controls)
    assert not EncodedControls.pays(spec, store, num_controls - 1)
    assert not EncodedControls.pays(StateSpec(**{**FORM, "bottleneck": False}), store, num_controls)
    monkeypatch.setattr(pertcast.generate.encoded, "_MOST_BYTES", num_controls * 10 * 4 - 1)
    assert not EncodedControls.pays(spec, store, num_controls)


def test_generated_cells_are_the_same_up_to_rounding(
    workspace: Workspace, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("non-targeting", "G1")
    run = Run(
        path=tmp_path / "run",
        spec=StateSpec(**FORM),
        experiment={
            "datasets": {"imported": "elsewhere"},
            "model": {"input": "genes"},
            "submission": {
                "targets": str(tmp_path / "targets.csv"),
                "rules": {"num_genes": 20, "num_targets": 1, "max_cells": 1000},
            },
        },
        genes=store.genes,
        output_genes=np.arange(GENES),
        hvg=np.arange(GENES),
        perts=names,
        contexts=(),
        batches=store.batches,
        control="non-targeting",
        target_sum=None,
        scale="log1p",
        store_path=store.path,
        store_fingerprint="",
        step=1,
    )
    (tmp_path / "targets.csv").write_text("target_gene,n_cells\nG1,130\n")
    features = PertFeatures(names, np.eye(2, dtype=np.float32), "onehot", "non-targeting", "a test")
    save_features(features, run.path / "features")
    save_run(run, network_of().state_dict(), inputs={})
    encoded: list[int] = []
    encode = FoldedNetwork.encode

    def counted(self: FoldedNetwork, control_NI: torch.Tensor) -> torch.Tensor:
        encoded.append(len(control_NI))
        return encode(self, control_NI)

    monkeypatch.setattr(FoldedNetwork, "encode", counted)
    once = ad.read_h5ad(generate(run.path, tmp_path / "once", store_path=store.path) / "H1" / "G1.h5ad")
    assert sum(encoded) == int((store.pert_codes == store.control_code).sum())
    monkeypatch.setattr(EncodedControls, "pays", lambda *_: False)
    each = ad.read_h5ad(generate(run.path, tmp_path / "each", store_path=store.path) / "H1" / "G1.h5ad")
    assert sum(encoded) == int((store.pert_codes == store.control_code).sum())
    np.testing.assert_allclose(once.X.toarray(), each.X.toarray(), atol=1e-5)
    assert each.X.toarray().std() > 0.01
