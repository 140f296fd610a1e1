"""A setting is used, or refused: on the command line, after an edit of the file, and in what is recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

import pertcast.config.load
from conftest import write_small_h5ad
from pertcast.config import STORE_KEYS, Experiment, LossConfig, load_experiment, rebuild_experiment
from pertcast.config.load import _NOT_USED, _USED, COMMANDS_WITH_SET, flat, uses
from pertcast.config.sections import Section
from pertcast.data.prepare import prepare
from pertcast.data.store import Store
from pertcast.errors import CheckpointError, ConfigError, DataError
from pertcast.files.artefacts import read_json
from pertcast.generate import generate
from pertcast.ladder.calibration import calibrate
from pertcast.ladder.compare import candidates_of, compare
from pertcast.models.run_folder import open_run
from pertcast.models.state import Prediction
from pertcast.preflight import preflight
from pertcast.train import train
from pertcast.train.adapt import adapt
from pertcast.train.loss_terms import loss_terms
from pertcast.train.new_line import adapted_experiment
from workspace import Workspace, make_workspace

TABLES = {"datasets": "datasets.small", "training": "training.small", "zeroshot": 'zeroshot."small.H1"'}
TABLES |= {
    "fewshot": 'fewshot."small.H1".val',
    "columns.rename": "columns.rename.X",
    "columns.of": "columns.of.small.batch",
}
TABLES |= {"submission.rules": "submission.rules.num_genes"}
VALUES = {
    "datasets": '"data"',
    "training": '"train"',
    "zeroshot": '"train"',
    "fewshot": '["G1"]',
    "columns.rename": '"Y"',
    "columns.of": '"batch"',
    "submission.rules": "20",
    "columns.context": '"H1"',
    "features.path": '"genes.csv"',
    "submission.genes": '"genes.csv"',
    "submission.targets": '"targets.csv"',
    "submission.context": '"H1"',
    "submission.dataset": '"small"',
    "submission.num_controls": "5",
    "columns.cell_type": '"cell_type"',
    "columns.batch": '"batch"',
    "columns.layer": '"counts"',
    "model.set_size": "8",
    "model.hidden": "16",
    "model.layers": "1",
    "model.heads": "2",
    "model.feedforward": "32",
    "model.encoder_layers": "1",
    "model.decoder_layers": "1",
}
LEAVES = dict(flat(Experiment(datasets={"small": "data"}).as_json() | {"datasets": {}}))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("settings") / "w")


@pytest.mark.parametrize("command", COMMANDS_WITH_SET)
@pytest.mark.parametrize("leaf", LEAVES)
def test_every_key_on_every_command_is_used_or_refused(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, command: str, leaf: str
) -> None:
    monkeypatch.chdir(workspace.folder)
    key, value = TABLES.get(leaf, leaf), VALUES.get(leaf, json.dumps(LEAVES[leaf]))
    assert value != "null", leaf
    if leaf == "columns.context":
        value = '"H1"'
    problems: list[str] = []
    try:
        load_experiment(workspace.experiment, [f"{key}={value}"], command=command)
    except ConfigError as error:
        problems = [str(problem) for problem in error.problems]
    refused = [text for text in problems if f"`pertcast {command}` does not use it" in text]
    assert bool(refused) == (not uses(command, leaf))
    if refused:
        assert refused[0].startswith(f"--set {key.replace(chr(34), '')}")
        others = [name for name in COMMANDS_WITH_SET if uses(name, leaf)]
        assert all(f"`pertcast {name}`" in refused[0] for name in others)


@contextmanager
def recorded_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Record which keys are read while an experiment is worked on, not while it is loaded."""
    whole = Experiment(datasets={"d": "d"})
    names = {
        type(getattr(whole, name)): name
        for name in Experiment.model_fields
        if isinstance(getattr(whole, name), Section)
    }
    reads: set[str] = set()
    loading = 0
    resolve = pertcast.config.load._resolve

    def quiet(*given: Any, **more: Any) -> Experiment:
        nonlocal loading
        loading += 1
        try:
            return resolve(*given, **more)
        finally:
            loading -= 1

    def spy(self: Section, name: str) -> Any:
        section = names.get(type(self))
        if not loading and section is not None and name in type(self).model_fields:
            reads.add(f"{section}.{name}")
        return object.__getattribute__(self, name)

    monkeypatch.setattr(pertcast.config.load, "_resolve", quiet)
    monkeypatch.setattr(Section, "__getattribute__", spy, raising=False)
    yield reads
    monkeypatch.undo()


def declared(command: str, key: str) -> bool:
    """Return whether the table names a key for a command, be it one that the command decides itself."""
    keys = (*_USED[command], *_NOT_USED.get(command, ()))
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def test_no_command_reads_a_key_that_it_refuses(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command is run, and every key that it looks at must be one of its own."""
    held = (
        'fewshot."small.H1".val=["G3"]',
        "features.missing=mean",
        "train.steps=2",
        "train.val_every=2",
        "loss.mae=1",
        "loss.de=1",
        "loss.rank=1",
    )
    experiment = load_experiment(workspace.experiment, held)
    folder = workspace.folder / "reads"
    run, store = folder / "run", folder / "store"
    line = load_experiment(workspace.experiment, (*held, "adapt.trainable=bias"))
    steps: dict[str, Callable[[], object]] = {
        "prepare": lambda: prepare(experiment, store),
        "preflight": lambda: preflight(experiment, store=Store.open(store)),
        "train": lambda: train(experiment, store, run),
        "generate": lambda: generate(run, folder / "parts"),
        "calibrate": lambda: calibrate(run),
        "adapt": lambda: adapt(run, line, prepare(adapted_experiment(run, line), folder / "line"), folder / "adapted"),
        "compare": lambda: compare(
            candidates_of([workspace.experiment], rungs=[], models=["mean"]), folder / "c", seeds=1, folds=3
        ),
    }
    for command, act in steps.items():
        # a few targets are too few to calibrate on, which is said at the end
        ends = pytest.raises(DataError) if command == "calibrate" else nullcontext()
        with recorded_reads(monkeypatch) as reads, ends:
            act()
        assert reads, command
        assert {key for key in reads if not declared(command.replace("preflight", "train"), key)} == set(), command


EDITS = {
    "datasets": 'datasets.small="other.h5ad"',
    "training": "training={}",
    "zeroshot": 'zeroshot."small.H1"="test"',
    "fewshot": 'fewshot."small.H1".val=["G1"]',
    "columns.pert": "columns.pert=gene",
    "columns.control": "columns.control=G1",
    "columns.cell_type": "columns.cell_type=batch",
    "columns.context": "columns.context=H1",
    "columns.batch": "columns.batch=cell_type",
    "columns.layer": "columns.layer=counts",
    "columns.rename": "columns.rename.G1=G2",
    "columns.of": "columns.of.small.batch=cell_type",
    "prepare.scale": "prepare.scale=counts",
    "prepare.target_sum": "prepare.target_sum=10000",
    "prepare.num_hvgs": "prepare.num_hvgs=5",
    "prepare.missing_genes": "prepare.missing_genes=zero",
    "prepare.controls": "prepare.controls=shared",
    "prepare.val_controls": "prepare.val_controls=0.5",
    "prepare.test_controls": "prepare.test_controls=0.5",
    "prepare.holdout_cells": "prepare.holdout_cells=0.5",
    "prepare.seed": "prepare.seed=7",
    "submission.genes": "submission.genes=targets.csv",
    "submission.season": "submission.season=vcc2026",
    "submission.rules": "submission.rules.num_targets=7",
    "model.input": "model.input='obsm:X_pca'",
}


@pytest.fixture(scope="module")
def stored(workspace: Workspace) -> Path:
    return prepare(load_experiment(workspace.experiment), workspace.folder / "stored")


@pytest.mark.parametrize("kind", ["state", "mean"])
@pytest.mark.parametrize(
    "leaf", [key for key in LEAVES if any(key == k or key.startswith(f"{k}.") for k in STORE_KEYS)]
)
def test_a_store_made_otherwise_is_refused_and_the_key_is_named(
    workspace: Workspace, stored: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, leaf: str, kind: str
) -> None:
    monkeypatch.chdir(workspace.folder)
    experiment = rebuild_experiment(
        load_experiment(workspace.experiment).as_json(), [EDITS[leaf], f"model.kind={kind}"], place=tmp_path
    )
    with pytest.raises(CheckpointError, match="was made with other settings; run `pertcast prepare`") as caught:
        train(experiment, stored, tmp_path / "run")
    assert any(problem.place.startswith(leaf) for problem in caught.value.problems), caught.value.problems
    assert not (tmp_path / "run").exists()


def test_data_in_another_folder_are_no_other_setting_and_the_record_is_the_stores(
    workspace: Workspace, stored: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(workspace.data.parent, elsewhere / "data")
    for path in (workspace.experiment, workspace.genes, workspace.targets):
        shutil.copy(path, elsewhere / path.name)
    run = train(load_experiment(elsewhere / "experiment.toml", ["model.kind=mean"]), stored, tmp_path / "run")
    recorded = open_run(run).experiment
    assert recorded["datasets"] == {"small": str(workspace.data.parent)}
    assert recorded["prepare"] == Store.open(stored).config["prepare"]


def test_generation_refuses_another_experiment_than_the_runs(
    workspace: Workspace, stored: Path, tmp_path: Path
) -> None:
    run = train(load_experiment(workspace.experiment, ["model.kind=mean"]), stored, tmp_path / "run")
    other = load_experiment(workspace.experiment, ["model.kind=mean", "prepare.holdout_cells=0.5"])
    with pytest.raises(CheckpointError, match="trained with other settings") as caught:
        generate(run, tmp_path / "parts", experiment=other)
    assert [problem.place for problem in caught.value.problems] == ["prepare.holdout_cells"]
    with pytest.raises(ConfigError, match="`pertcast generate` does not use it"):
        generate(run, tmp_path / "parts", overrides=["model.hidden=64"])


@pytest.mark.parametrize("term", ["mae", "de", "rank", "nb"])
def test_a_term_that_was_asked_for_is_never_dropped(term: str) -> None:
    import torch

    from pertcast.train.batches import Batch

    cells = torch.zeros(1, 2, 3)
    codes = torch.zeros(1, dtype=torch.int64)
    batch = Batch(cells, torch.zeros(1, 1), codes[:, None].expand(1, 2), codes, cells, None, codes)
    with pytest.raises(ValueError, match=f"the term {term} needs"):
        loss_terms(Prediction(cells, None), batch, LossConfig.model_validate({term: 1.0}))


def test_a_baseline_refuses_what_it_does_not_use(workspace: Workspace) -> None:
    for key in ("train.steps=5", "loss.mae=1", "model.hidden=64"):
        with pytest.raises(ConfigError, match=r"model\.kind = 'mean' does not use it"):
            load_experiment(workspace.experiment, ["model.kind=mean", key], command="run")
    load_experiment(workspace.experiment, ["model.kind=mean", "model.output=hvg"], command="run")


def test_adaptation_takes_features_from_where_they_are_now(workspace: Workspace, tmp_path: Path) -> None:
    import numpy as np

    vectors = {"gene": np.array(["G1", "G2", "G3", "G4"]), "embedding": np.eye(4, dtype=np.float32)}
    np.savez(tmp_path / "old.npz", gene=vectors["gene"], embedding=vectors["embedding"])
    file = ("features.kind=file", f"features.path={tmp_path / 'old.npz'}", "train.steps=1")
    experiment = load_experiment(workspace.experiment, file)
    run = train(experiment, prepare(experiment, tmp_path / "store"), tmp_path / "run")
    (tmp_path / "old.npz").rename(tmp_path / "new.npz")
    recorded = read_json(run / "run.json")["experiment"]["features"]
    assert recorded["path"] == str(tmp_path / "old.npz")
    write_small_h5ad(tmp_path / "line.h5ad", contexts=("K2",), perts=("non-targeting", "G4"))
    now = ("features.kind=file", f"features.path={tmp_path / 'new.npz'}")
    line = load_experiment(workspace.experiment, [f"datasets.small={tmp_path / 'line.h5ad'}", *now])
    adapted = adapted_experiment(run, line)
    assert adapted.features.path == tmp_path / "new.npz"
