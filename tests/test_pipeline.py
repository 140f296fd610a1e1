"""The whole path as users run it: it ends in a valid archive, and whatever interrupts it, the same command goes on.

Interrupted runs must end with the weights and the prediction of a run that was never interrupted, to the bit.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from safetensors.numpy import load_file

from pertcast.config import load_experiment
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import ConfigError, DataError
from pertcast.files.artefacts import hash_file, read_manifest, verify_artefact
from pertcast.generate import generate
from pertcast.pipeline import run_experiment
from pertcast.progress import SILENT, Advance
from pertcast.train.precision import resolve_precision
from workspace import Workspace, make_workspace

SLOW = ("--set", "train.steps=300", "--set", "submission.rules.max_cells=20000")
MANY = "target_gene,n_cells\nG1,2500\nG2,2500\nG3,14000\n"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "w")


def same_weights(one: Path, other: Path) -> bool:
    tensors, others = (load_file(run / "weights.safetensors") for run in (one, other))
    return tensors.keys() == others.keys() and all((tensors[name] == others[name]).all() for name in tensors)


def test_a_run_ends_in_a_valid_archive_with_just_the_planned_cells(workspace: Workspace) -> None:
    outcome = run_experiment(workspace.experiment, workspace.out)
    assert outcome.report.ok
    cells = ad.read_h5ad(outcome.prediction)
    # 6 controls are 5 % of the cap of 120; alpha = 114/116, rounded down for each target
    assert cells.obs["target_gene"].value_counts().to_dict() == {"G1": 29, "G2": 40, "G3": 44, "non-targeting": 6}
    assert (cells.X.dtype, list(cells.var_names)) == (np.float32, [f"G{number}" for number in range(20)])
    assert outcome.archive.is_file()
    for artefact in (outcome.store, outcome.run, outcome.parts, outcome.prediction, outcome.archive):
        assert verify_artefact(artefact) == []


def test_copied_controls_are_training_cells_on_the_scale_of_the_model(workspace: Workspace) -> None:
    outcome = run_experiment(workspace.experiment, workspace.out)
    raw = ad.read_h5ad(workspace.data)
    prediction = ad.read_h5ad(outcome.prediction)
    copied = prediction[prediction.obs["target_gene"] == "non-targeting"].X.toarray()
    counts = raw[raw.obs["target_gene"] == "non-targeting"].X.toarray()
    target_sum = np.expm1(copied).sum(1).mean()
    candidates = np.log1p(counts / counts.sum(1, keepdims=True) * target_sum)
    distance = np.abs(copied[:, None] - candidates[None]).max(-1)
    assert (distance.min(1) < 1e-5).all()
    assert len(set(distance.argmin(1))) == len(copied)


def test_controls_can_be_predicted(workspace: Workspace) -> None:
    copied = run_experiment(workspace.experiment, workspace.out)
    before = ad.read_h5ad(copied.prediction)
    predicted = run_experiment(
        workspace.experiment, workspace.out, overrides=["submission.controls=predicted", "submission.num_controls=20"]
    )
    after = ad.read_h5ad(predicted.prediction)
    assert predicted.report.ok
    assert (before.obs["target_gene"] == "non-targeting").sum() == 6
    assert (after.obs["target_gene"] == "non-targeting").sum() == 20


def test_a_second_run_does_nothing_and_a_change_redoes_only_what_depends_on_it(workspace: Workspace) -> None:
    outcome = run_experiment(workspace.experiment, workspace.out)
    watched = {
        "store": outcome.store / "data.npy",
        "weights": outcome.run / "weights.safetensors",
        "part": outcome.parts / "H1" / "G2.h5ad",
        "changed part": outcome.parts / "H1" / "G3.h5ad",
        "prediction": outcome.prediction,
    }
    times = {name: path.stat().st_mtime_ns for name, path in watched.items()}
    run_experiment(workspace.experiment, workspace.out)
    assert {name: path.stat().st_mtime_ns for name, path in watched.items()} == times

    workspace.targets.write_text("target_gene,n_cells\nG1,30\nG2,40\nG3,12\n")
    run_experiment(workspace.experiment, workspace.out, overrides=["submission.num_controls=6"])
    redone = {name for name, path in watched.items() if path.stat().st_mtime_ns != times[name]}
    assert redone == {"changed part", "prediction"}


class Interrupter:
    """A progress that interrupts generation after some parts."""

    def __init__(self, after: int) -> None:
        self.left = after

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Any:
        def advance(amount: int, detail: str = "") -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

        yield advance

    def note(self, text: str) -> None:
        """Do nothing."""

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Do nothing."""


def part_hashes(parts: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in parts.glob("*/*.h5ad")}


def test_interrupted_generation_goes_on_with_the_parts_that_are_missing(workspace: Workspace) -> None:
    outcome = run_experiment(workspace.experiment, workspace.out)
    whole = part_hashes(outcome.parts)
    again = workspace.folder / "again"
    with pytest.raises(KeyboardInterrupt):
        generate(outcome.run, again, progress=Interrupter(after=2))
    made = {path: path.stat().st_mtime_ns for path in again.glob("*/*.h5ad")}
    assert len(made) == 2
    generate(outcome.run, again)
    assert part_hashes(again) == whole
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in made.items())


def cells_of(parts: Path) -> dict[str, ad.AnnData]:
    return {path.stem: ad.read_h5ad(path) for path in sorted((parts / "H1").glob("G*.h5ad"))}


@pytest.mark.parametrize("asked", [("G2",), ("G3", "G1"), ("G3", "G2", "G1")])
def test_a_target_gets_the_same_cells_whatever_else_is_asked_for(workspace: Workspace, asked: tuple[str, ...]) -> None:
    outcome = run_experiment(workspace.experiment, workspace.out)
    cells = {"G1": 30, "G2": 41, "G3": 45}
    workspace.targets.write_text("".join(["target_gene,n_cells\n", *(f"{name},{cells[name]}\n" for name in asked)]))
    fewer, whole = workspace.folder / "fewer", cells_of(outcome.parts)
    rules = ["submission.num_controls=4", f"submission.rules.num_targets={len(asked)}"]
    generate(outcome.run, fewer, overrides=rules)
    for name in asked:
        found, same = ad.read_h5ad(fewer / "H1" / f"{name}.h5ad"), min(cells[name], whole[name].n_obs)
        assert found.n_obs == cells[name]
        assert found.obs["batch"].tolist()[:same] == whole[name].obs["batch"].tolist()[:same]
        assert np.abs(found.X[:same].toarray() - whole[name].X[:same].toarray()).max() < 1e-5


@pytest.mark.parametrize("size", [1, 3, 50])
def test_the_cells_are_the_same_whatever_the_batch_size(workspace: Workspace, size: int) -> None:
    outcome = run_experiment(workspace.experiment, workspace.out)
    other = workspace.folder / "other"
    generate(outcome.run, other, overrides=[f"generate.sets_per_step={size}"])
    whole = cells_of(outcome.parts)
    assert len(whole) == 3
    for name, found in cells_of(other).items():
        assert found.obs.equals(whole[name].obs)
        assert np.abs(found.X.toarray() - whole[name].X.toarray()).max() < 1e-5


def start(workspace: Workspace, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pertcast", "run", str(workspace.experiment), "--out", str(out), *SLOW]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def stop_when(process: subprocess.Popen[bytes], ready: Callable[[], bool], how: signal.Signals) -> int:
    """Send a signal as soon as a condition holds; return the exit code."""
    end = time.monotonic() + 120
    while process.poll() is None and not ready():
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(how)
    return process.wait(timeout=120)


def num_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.is_file() else 0


def test_stopped_in_training_and_in_generation_the_same_command_ends_as_if_nothing_had_happened(
    workspace: Workspace,
) -> None:
    workspace.targets.write_text(MANY)
    calm, rough = workspace.folder / "calm", workspace.folder / "rough"
    assert start(workspace, calm).wait(timeout=300) == 0
    stops = [
        (lambda: num_lines(rough / "run" / "metrics.jsonl") > 40, signal.SIGKILL, -signal.SIGKILL),
        (lambda: num_lines(rough / "run" / "metrics.jsonl") > 150, signal.SIGINT, 130),
        (lambda: (rough / "parts" / "H1" / "G1.h5ad").is_file(), signal.SIGKILL, -signal.SIGKILL),
        (lambda: (rough / "parts" / "H1" / "G2.h5ad").is_file(), signal.SIGINT, 130),
    ]
    for ready, how, code in stops:
        assert stop_when(start(workspace, rough), ready, how) == code
        assert not (rough / "prediction.h5ad").exists()
    assert start(workspace, rough).wait(timeout=300) == 0
    assert same_weights(calm / "run", rough / "run")
    assert hash_file(calm / "prediction.h5ad") == hash_file(rough / "prediction.h5ad")
    assert hash_file(calm / "prediction.vcc") == hash_file(rough / "prediction.vcc")
    assert (calm / "run" / "metrics.jsonl").read_text() == (rough / "run" / "metrics.jsonl").read_text()
    assert not [path for path in rough.rglob("*") if ".partial-" in path.name]


def test_the_experiment_is_stored_in_every_artefact(workspace: Workspace) -> None:
    outcome = run_experiment(workspace.experiment, workspace.out)
    experiment = load_experiment(workspace.experiment)
    assert read_manifest(outcome.store).config == experiment.as_json()
    resolved, _ = resolve_precision(experiment, outcome.run)
    assert read_manifest(outcome.run).config == resolved.as_json()
    assert read_manifest(outcome.parts).config == resolved.as_json()
    assert read_manifest(outcome.prediction).inputs
    assert read_manifest(outcome.archive).inputs


def test_silent_progress_does_nothing() -> None:
    task: AbstractContextManager[Advance] = SILENT.task("x", 3, "cells")
    with task as advance:
        advance(1, detail="half")
    SILENT.note("text")
    SILENT.table("title", ["a"], [["b"]])


def set_all(*assignments: str) -> list[str]:
    return ["train.steps=4", *assignments]


def test_genes_that_a_model_does_not_predict_are_the_control_cells_and_are_counted(workspace: Workspace) -> None:
    only_hvg = set_all("model.input=hvg", "model.output=hvg")
    with pytest.raises(ConfigError, match=r"10 of 20 genes.*generate.unpredicted_genes"):
        run_experiment(workspace.experiment, workspace.out, overrides=only_hvg)
    outcome = run_experiment(
        workspace.experiment, workspace.out, overrides=[*only_hvg, "generate.unpredicted_genes=control"]
    )
    store = Store.open(outcome.store)
    others = np.setdiff1d(np.arange(20), store.hvg)
    predicted = ad.read_h5ad(outcome.parts / "H1" / "G1.h5ad").X.toarray()
    controls = store.log1p(store.rows(split=Split.TRAIN, pert=store.control_code))
    distance = np.abs(predicted[:, None, others] - controls[None][:, :, others]).max(-1)
    assert (distance.min(1) == 0).all()
    notes = read_manifest(outcome.parts).notes
    assert any("10 genes that the model does not predict are copied" in note for note in notes)
    assert notes == read_manifest(outcome.prediction).notes


def test_a_model_of_embeddings_decodes_to_genes(workspace: Workspace) -> None:
    cells = ad.read_h5ad(workspace.data)
    cells.obsm["X_pca"] = np.random.default_rng(0).normal(size=(cells.n_obs, 6)).astype(np.float32)
    cells.write_h5ad(workspace.data)
    outcome = run_experiment(workspace.experiment, workspace.out, overrides=set_all("model.input=obsm:X_pca"))
    assert outcome.report.ok
    values = ad.read_h5ad(outcome.prediction).X
    assert values.shape[1] == 20
    assert values.min() >= 0


def test_a_target_without_a_feature_is_filled_in_only_when_asked_and_then_counted(workspace: Workspace) -> None:
    np.savez(workspace.folder / "f.npz", gene=np.array(["G1", "G2"]), embedding=np.eye(2, 3, dtype=np.float32))
    features = set_all("features.kind=file", f"features.path={str(workspace.folder / 'f.npz')!r}")
    with pytest.raises(DataError, match=r"'G3': it has no feature"):
        run_experiment(workspace.experiment, workspace.out, overrides=features)
    outcome = run_experiment(
        workspace.experiment, workspace.out, overrides=[*features, "features.missing=mean", "train.control_sets=false"]
    )
    expected = "1 target(s) have no feature of their own; filled in as asked for with features.missing = 'mean': G3"
    for artefact in (outcome.parts, outcome.prediction):
        assert any(note.startswith(expected) for note in read_manifest(artefact).notes)


def test_batches_and_contexts_can_be_embedded(workspace: Workspace) -> None:
    overrides = set_all("model.batch_embedding=true", "model.context_embedding=true", "train.match=batch")
    outcome = run_experiment(workspace.experiment, workspace.out, overrides=overrides)
    assert outcome.report.ok
    assert set(ad.read_h5ad(outcome.prediction).obs["batch"]) == {"b1", "b2"}
