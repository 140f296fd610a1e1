from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pertcast.config import ModelConfig
from pertcast.errors import CheckpointError
from pertcast.files.artefacts import MANIFEST, hash_file, read_json, read_manifest, verify_artefact, write_json
from pertcast.models.run_folder import (
    RUN_JSON,
    WEIGHTS,
    Run,
    load_tensors,
    load_weights,
    open_run,
    save_run,
    save_tensors,
)
from pertcast.models.spec import spec_for
from pertcast.models.state import StateTransition

SPEC = spec_for(
    ModelConfig(preset="tiny", layers=1, hidden=8, heads=2, feedforward=8, set_size=4),
    num_genes=6,
    input_dim=6,
    output_dim=6,
    pert_dim=3,
    num_batches=0,
    num_contexts=1,
)


def small_run(folder: Path) -> Run:
    return Run(
        path=folder / "run",
        spec=SPEC,
        experiment={"model": {"input": "genes"}, "datasets": {"h1": "/data/h1.h5ad"}},
        genes=tuple("ABCDEF"),
        output_genes=np.arange(6),
        hvg=np.array([1, 4]),
        perts=("A", "non-targeting"),
        contexts=("H1",),
        batches=(),
        control="non-targeting",
        target_sum=1e4,
        scale="counts",
        store_path=folder / "store",
        store_fingerprint="f00",
        step=12,
        metrics={"val_loss": 0.5, "last_step": 20},
        features={"kind": "onehot"},
        notes=("one note",),
    )


@pytest.fixture
def saved(tmp_path: Path) -> Run:
    run = small_run(tmp_path)
    (run.path / "features").mkdir(parents=True)
    (run.path / "features" / "features.json").write_text("{}")
    (run.path / "metrics.jsonl").write_text("")
    save_run(run, StateTransition(SPEC).state_dict(), inputs={"store": "f00"})
    return run


def test_what_is_written_reads_back(saved: Run) -> None:
    run = open_run(saved.path)
    for name in vars(saved):
        np.testing.assert_equal(getattr(run, name), getattr(saved, name), err_msg=name)
    model, expected = run.model(), StateTransition(SPEC).state_dict()
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name])
    manifest = read_manifest(saved.path, kind="run")
    assert set(manifest.files) == {WEIGHTS, RUN_JSON, "features/features.json"}
    assert manifest.inputs == {"store": "f00"}
    assert manifest.notes == ("one note",)


def test_equal_runs_are_equal_bytes(saved: Run) -> None:
    before = {name: hash_file(saved.path / name) for name in (WEIGHTS, RUN_JSON, MANIFEST)}
    save_run(saved, StateTransition(SPEC).state_dict(), inputs={"store": "f00"})
    assert {name: hash_file(saved.path / name) for name in before} == before


def test_a_run_moved_with_its_store_finds_it(saved: Run, tmp_path: Path) -> None:
    saved.store_path.mkdir()
    (tmp_path / "elsewhere").mkdir()
    shutil.move(saved.path, tmp_path / "elsewhere" / "run")
    assert open_run(tmp_path / "elsewhere" / "run").store_path == saved.store_path
    shutil.move(saved.store_path, tmp_path / "elsewhere" / "store")
    assert open_run(tmp_path / "elsewhere" / "run").store_path == tmp_path / "elsewhere" / "store"


def rehash(folder: Path) -> None:
    """Make the manifest agree with the files, so that the checks behind it are reached."""
    manifest = read_json(folder / MANIFEST)
    manifest["files"] = {name: hash_file(folder / name) for name in manifest["files"]}
    write_json(folder / MANIFEST, manifest)


def test_misfitting_tensors_are_all_named(saved: Run) -> None:
    tensors = load_file(saved.path / WEIGHTS)
    tensors["basal_encoder.weight"] = torch.zeros(3, 3)
    del tensors["pert_encoder.0.bias"]
    tensors["stranger"] = torch.zeros(2)
    save_file(tensors, saved.path / WEIGHTS)
    rehash(saved.path)
    for opening in (lambda: open_run(saved.path), lambda: load_weights(StateTransition(SPEC), saved.path / WEIGHTS)):
        with pytest.raises(CheckpointError) as caught:
            opening()
        message = str(caught.value)
        assert "basal_encoder.weight: expected shape (8, 6), got (3, 3)" in message
        assert "pert_encoder.0.bias: expected shape (8,), got no such tensor" in message
        assert "stranger" in message
        assert len(caught.value.problems) == 3


@pytest.mark.parametrize("name", [WEIGHTS, RUN_JSON, "features/features.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_damage_is_named(saved: Run, name: str, damage: str) -> None:
    path = saved.path / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "truncated" else content[:-1] + b"!")
    with pytest.raises(CheckpointError, match=name):
        open_run(saved.path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"genes": None}, "not a run of this version"),
        ({"spec": {"input_dim": 3}}, "not a run of this version"),
        ({"store_path": "store"}, "not a run of this version"),
    ],
)
def test_a_run_json_of_another_shape_is_refused(saved: Run, change: dict[str, Any], expected: str) -> None:
    write_json(saved.path / RUN_JSON, {**read_json(saved.path / RUN_JSON), **change})
    rehash(saved.path)
    with pytest.raises(CheckpointError, match=expected):
        open_run(saved.path)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_run(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"kind": "store", "notes": []}))
    with pytest.raises(CheckpointError, match="expected a run, got a store"):
        open_run(tmp_path)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_tensors(path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_tensors(tmp_path / "absent.safetensors")


@settings(deadline=None, max_examples=30)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
)
def test_tensors_survive_the_round_trip(
    shapes: list[list[int]], dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tensors") / "a.safetensors"
    tensors = {f"t{i}": torch.arange(int(np.prod(shape))).reshape(shape).to(dtype) for i, shape in enumerate(shapes)}
    save_tensors(path, tensors)
    back = load_tensors(path)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(back[name], value)
        assert back[name].dtype == dtype


def test_weights_are_as_readable_as_other_files(saved: Run) -> None:
    assert (saved.path / WEIGHTS).stat().st_mode == (saved.path / RUN_JSON).stat().st_mode


def test_a_failed_save_leaves_no_run(saved: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pertcast.models.run_folder.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_run(replace(saved, step=13), {}, inputs={})
    assert not (saved.path / MANIFEST).exists()
    assert not list(saved.path.glob(".*"))


def test_verify_sees_nothing_wrong(saved: Run) -> None:
    assert verify_artefact(saved.path) == []
