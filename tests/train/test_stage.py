from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from conftest import write_small_h5ad
from pertcast.config import Experiment, load_experiment, rung_overrides
from pertcast.data.cell_sets import CellSets
from pertcast.data.features import open_features
from pertcast.data.prepare import prepare
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import CheckpointError, ConfigError, DataError
from pertcast.files.artefacts import hash_file, verify_artefact
from pertcast.models.run_folder import open_run
from pertcast.train import train
from pertcast.train.batches import Codes, SetStream, StreamState
from pertcast.train.precision import resolve_precision
from training_bench import EXPERIMENT, Watcher, interrupt, lines

STEPS = 12

ALL_TERMS = (*rung_overrides("c4"), "loss.warmup_steps=5", "loss.rank_margin=0.5")


class Bench:
    """Data, an experiment file, and stores by the overrides that they depend on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "experiment.toml"
        self.file.write_text(EXPERIMENT)
        cells = ad.read_h5ad(write_small_h5ad(folder / "small.h5ad"))
        cells.obsm["X_small"] = np.log1p(cells.X.toarray()[:, :5]).astype(np.float32) - 2
        cells.write_h5ad(folder / "small.h5ad")
        self._stores: dict[tuple[str, ...], Path] = {}

    def experiment(self, *overrides: str) -> Experiment:
        return load_experiment(self.file, overrides)

    def store(self, *overrides: str) -> Path:
        if overrides not in self._stores:
            out = self.folder / f"store{len(self._stores)}"
            self._stores[overrides] = prepare(self.experiment(*overrides), out)
        return self._stores[overrides]

    def train(self, out: Path, *overrides: str, progress: Watcher | None = None, store: Sequence[str] = ()) -> Path:
        return train(self.experiment(*overrides, *store), self.store(*store), out, progress=progress or Watcher())


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def whole(bench: Bench) -> Path:
    """A run that nothing interrupted."""
    return bench.train(bench.folder / "whole")


def assert_same_run(run: Path, other: Path) -> None:
    weights, others = load_file(run / "weights.safetensors"), load_file(other / "weights.safetensors")
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert (run / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    assert open_run(run).metrics == open_run(other).metrics
    newest, newest_other = ([*sorted((path / "checkpoints").iterdir())][-1] for path in (run, other))
    assert hash_file(newest / "optimizer.safetensors") == hash_file(newest_other / "optimizer.safetensors")


def test_a_run_has_all_that_generation_needs(bench: Bench, whole: Path) -> None:
    run, store = open_run(whole), Store.open(bench.store())
    assert verify_artefact(whole) == []
    assert run.spec.set_size == 8
    assert run.genes == store.genes
    assert run.output_genes.tolist() == list(range(20))
    assert (run.perts, run.contexts, run.batches) == (store.perts, store.contexts, store.batches)
    assert (run.target_sum, run.scale, run.control) == (store.target_sum, "counts", "non-targeting")
    assert (run.store_path, run.store_fingerprint) == (bench.store(), store.fingerprint)
    resolved, _ = resolve_precision(bench.experiment(), whole)
    assert run.experiment == resolved.as_json()
    assert run.metrics["num_parameters"] == sum(value.numel() for value in run.model().parameters())
    assert run.metrics["last_step"] == STEPS
    assert (run.features["kind"], run.features["dim"]) == ("onehot", 4)
    assert sorted(path.name for path in (whole / "features").iterdir()) == ["features.json", "features.safetensors"]
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == ["step_000000009", "step_000000012"]


def test_the_weights_are_of_the_best_validated_step(whole: Path) -> None:
    run, validations = open_run(whole), lines(whole, "val")
    assert [entry["step"] for entry in validations] == [4, 8, 12]
    best = min(validations, key=lambda entry: entry["loss"])
    assert (run.step, run.metrics["val_loss"]) == (best["step"], best["loss"])


def test_each_step_has_one_line_and_the_learning_rate_rises_to_its_height(bench: Bench, tmp_path: Path) -> None:
    watcher = Watcher()
    run = bench.train(tmp_path / "run", "train.warmup_steps=4", progress=watcher)
    assert [entry["step"] for entry in lines(run)] == list(range(1, STEPS + 1))
    rates = [entry["learning_rate"] for entry in lines(run)]
    np.testing.assert_allclose(rates, [2.5e-4, 5e-4, 7.5e-4] + [1e-3] * 9)
    assert all(entry["loss"] == entry["energy"] > 0 and entry["grad_norm"] > 0 for entry in lines(run))
    assert any(detail.startswith("loss ") and detail.endswith(" sets/s") for detail in watcher.details)
    assert any(detail.startswith("validating") for detail in watcher.details)


def test_the_learning_rate_falls_to_a_hundredth_where_asked(bench: Bench, tmp_path: Path) -> None:
    run = bench.train(tmp_path / "run", "train.decay_steps=8", "train.warmup_steps=2")
    rates = [entry["learning_rate"] for entry in lines(run)]
    np.testing.assert_allclose(
        rates, [1e-3 * share for share in (0.5, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, *[0.01] * 4)]
    )


def test_training_learns(bench: Bench, tmp_path: Path) -> None:
    settings_ = ("train.steps=500", "train.val_every=50", "train.checkpoint_every=500", "model.dropout=0.0")
    run = bench.train(tmp_path / "run", *settings_, "train.learning_rate=1e-2", "train.seed=5")
    losses = [entry["loss"] for entry in lines(run, "val")]
    assert losses[-1] < 0.7 * losses[0]
    # Each target loses its own gene in the data; the predictions must differ in just that, by far.
    store, model = Store.open(bench.store()), open_run(run).model()
    features = open_features(run / "features")
    controls = torch.from_numpy(store.log1p(store.rows(split=Split.VAL, pert=store.control_code)[:8]))[None]
    targets = ("G1", "G2", "G3")
    with torch.no_grad():
        mean_PG = torch.stack(
            [model(controls, torch.from_numpy(features.of([target]))).log1p_BSG.mean((0, 1)) for target in targets]
        )
    beside_PG = (mean_PG - (mean_PG.sum(0) - mean_PG) / 2).numpy()
    for target, beside_G in zip(targets, beside_PG, strict=True):
        lowest, second = np.argsort(beside_G)[:2]
        assert store.genes[int(lowest)] == target
        assert beside_G[lowest] < beside_G[second] - 0.5


@pytest.mark.parametrize("step", [1, 3, 4, 8, 11, 12])
def test_after_an_interruption_the_run_ends_as_if_there_had_been_none(
    bench: Bench, whole: Path, tmp_path: Path, step: int
) -> None:
    out, watcher = tmp_path / "run", Watcher(step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench.train(out, progress=watcher)
    assert watcher.notes[-1].startswith(f"stopped at step {step};")
    assert not (out / "manifest.json").exists()
    watcher = Watcher()
    bench.train(out, progress=watcher)
    assert watcher.begun_at == [step]
    assert_same_run(out, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_leaves_a_checkpoint(
    bench: Bench, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out, before = tmp_path / "run", signal.getsignal(number)
    expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    with pytest.raises(expected):
        bench.train(out, progress=Watcher(5, lambda: signal.raise_signal(number)))
    assert signal.getsignal(number) == before
    assert (out / "checkpoints" / "step_000000005").is_dir()
    bench.train(out)
    assert_same_run(out, whole)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from training_bench import Watcher
from pertcast.config import load_experiment
from pertcast.train import train
train(load_experiment(Path({file!r})), Path({store!r}), Path({out!r}),
      progress=Watcher({step}, lambda: os.kill(os.getpid(), signal.SIGKILL)))
"""


def test_a_killed_run_goes_on_from_its_checkpoint(bench: Bench, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    script = KILLED.format(
        tests=str(Path(__file__).parents[1]), file=str(bench.file), store=str(bench.store()), out=str(out), step=8
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [entry["step"] for entry in lines(out)] == list(range(1, 9))
    # What a kill in the middle of writing leaves behind.
    (out / "checkpoints" / ".step_000000009.partial-0").mkdir()
    (out / ".metrics.jsonl.partial-0").write_text("half")
    with (out / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "st')
    watcher = Watcher()
    bench.train(out, progress=watcher)
    assert watcher.begun_at == [6]
    assert_same_run(out, whole)
    assert not list(out.rglob(".*"))


def test_a_longer_training_goes_on_where_a_shorter_one_ended(bench: Bench, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    bench.train(out, "train.steps=8")
    assert open_run(out).metrics["last_step"] == 8
    bench.train(out)
    assert_same_run(out, whole)
    with pytest.raises(CheckpointError, match=r"trained for 12 steps already, and train\.steps is 8"):
        bench.train(out, "train.steps=8")


def test_a_finished_run_is_left_alone(bench: Bench, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    watcher = Watcher()
    assert bench.train(whole, "train.loggers=[]", "train.checkpoint_every=5", progress=watcher) == whole
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    assert any("already trained" in note for note in watcher.notes)


def test_another_configuration_is_refused_and_every_difference_named(bench: Bench, whole: Path) -> None:
    with pytest.raises(CheckpointError, match="Use another --out, or delete") as caught:
        bench.train(whole, "train.learning_rate=0.5", "model.dropout=0.2", "features.kind=coexpression")
    places = [problem.place for problem in caught.value.problems]
    assert places == ["features.kind", "model.dropout", "train.learning_rate"]
    assert "begun with 0.001, got 0.5" in str(caught.value)
    with pytest.raises(CheckpointError, match="store"):
        bench.train(whole, store=["prepare.seed=1"])


def test_a_folder_that_is_no_run_is_not_touched(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="holds no run"):
        bench.train(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_damaged_checkpoint_is_left_out_and_said(bench: Bench, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        bench.train(out, progress=Watcher(8, interrupt))
    broken = out / "checkpoints" / "step_000000008" / "weights.safetensors"
    broken.write_bytes(broken.read_bytes()[:-4])
    watcher = Watcher()
    bench.train(out, progress=watcher)
    assert watcher.begun_at == [6]
    assert any("step_000000008 is damaged" in note for note in watcher.notes)
    assert_same_run(out, whole)


def test_when_every_checkpoint_is_damaged_nothing_starts_anew_in_silence(
    bench: Bench, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for path in (out / "checkpoints").glob("*/state.json"):
        path.write_text("{")
    with pytest.raises(CheckpointError, match="no checkpoint is complete; remove"):
        bench.train(out, "train.steps=20")


def test_divergence_stops_with_its_step_and_keeps_the_checkpoint(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step \d+: .*(nan|inf).*lower train.learning_rate"):
        bench.train(tmp_path / "run", "train.learning_rate=1e37", "train.checkpoint_every=1", "train.clip=0")
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def test_training_stops_when_validation_no_longer_improves(bench: Bench, tmp_path: Path) -> None:
    overrides = ("train.steps=500", "train.val_every=1", "train.patience=3", "train.learning_rate=0.3")
    run = open_run(bench.train(tmp_path / "run", *overrides))
    assert run.metrics["stopped_early"]
    assert run.metrics["last_step"] == run.step + 3 < 500
    watcher = Watcher()
    bench.train(tmp_path / "run", *overrides, progress=watcher)
    assert any("already trained" in note for note in watcher.notes)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.input=hvg", "model.output=hvg"),
        ("model.input=hvg",),
        ("model.batch_embedding=true", "model.context_embedding=true", "train.match=context"),
        ("model.residual=none", "train.control_sets=false", "train.optimizer=adam", "train.accumulate=3"),
        ("train.precision=bf16", "features.kind=coexpression", "features.num_loadings=3"),
        ("model.residual=shift",),
        (*ALL_TERMS, "train.accumulate=2"),
        (
            *ALL_TERMS,
            "loss.de_head=learned",
            "loss.de_form=focal",
            "loss.rank_distance=cosine",
            "model.input=hvg",
            "model.output=hvg",
        ),
    ],
    ids=["hvg", "hvg-to-genes", "embeddings", "no-residual", "bf16", "shift", "all-terms", "all-terms-hvg"],
)
def test_every_kind_of_run_resumes_exactly(bench: Bench, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    calm = bench.train(tmp_path / "calm", "train.steps=6", *overrides)
    with pytest.raises(KeyboardInterrupt):
        bench.train(tmp_path / "rough", "train.steps=6", *overrides, progress=Watcher(4, interrupt))
    assert_same_run(bench.train(tmp_path / "rough", "train.steps=6", *overrides), calm)
    run = open_run(calm)
    assert len(run.output_genes) == (8 if "model.output=hvg" in overrides else 20)


def test_an_embedding_trains_with_a_decoder(bench: Bench, tmp_path: Path) -> None:
    store = ["model.input=obsm:X_small"]
    run = bench.train(tmp_path / "run", store=store)
    entry = lines(run)[-1]
    assert entry["loss"] == pytest.approx(entry["energy"] + entry["decoder"])
    spec = open_run(run).network
    assert (spec.input_dim, spec.output_dim, spec.num_genes, spec.output_space) == (5, 5, 20, "latent")
    only = bench.train(tmp_path / "only", "loss.energy=0", "loss.decoder=2", store=store)
    assert lines(only)[0]["loss"] == pytest.approx(2 * lines(only)[0]["decoder"])
    with pytest.raises(CheckpointError, match=r"model\.input.*'obsm:X_small'"):
        train(bench.experiment(*store), bench.store(), tmp_path / "none")


def test_without_validation_cells_the_last_weights_are_kept_and_it_is_said(bench: Bench, tmp_path: Path) -> None:
    watcher = Watcher()
    run = open_run(bench.train(tmp_path / "run", store=["prepare.holdout_cells=0.0"], progress=watcher))
    assert any("no validation cells" in note for note in watcher.notes)
    assert any("no validation cells" in note for note in run.notes)
    assert (run.step, run.metrics["val_loss"]) == (STEPS, None)


def test_small_groups_are_said(bench: Bench, tmp_path: Path) -> None:
    watcher = Watcher()
    bench.train(tmp_path / "run", "train.steps=1", "model.set_size=30", progress=watcher)
    assert any("fewer than 30 cells" in note for note in watcher.notes)


def test_accumulated_steps_are_one_large_step(bench: Bench, tmp_path: Path) -> None:
    settings_ = (
        "model.dropout=0.0",
        "train.steps=3",
        "train.optimizer=adam",
        "train.val_every=3",
        "train.precision=fp32",
    )
    large = bench.train(tmp_path / "large", *settings_, "train.sets_per_step=4")
    small = bench.train(tmp_path / "small", *settings_, "train.sets_per_step=2", "train.accumulate=2")
    one, other = ([entry["loss"] for entry in lines(run)] for run in (large, small))
    np.testing.assert_allclose(one, other, rtol=1e-4)


def test_the_global_generator_is_left_alone(bench: Bench, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    bench.train(tmp_path / "run", "train.steps=2")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_another_seed_gives_other_weights(bench: Bench, whole: Path, tmp_path: Path) -> None:
    other = bench.train(tmp_path / "run", "train.seed=1")
    assert hash_file(other / "weights.safetensors") != hash_file(whole / "weights.safetensors")
    assert lines(other)[0]["loss"] != lines(whole)[0]["loss"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("loss.energy=0",), "every term is switched off"),
        (("train.devices=3",), "multiple of devices = 3"),
        (("train.accelerator=tpux",), "accelerator"),
        (("train.loggers=['wandb']",), "pip install wandb"),
        (("model.heads=3",), "divisor of hidden"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    bench: Bench, tmp_path: Path, overrides: tuple[str, ...], expected: str
) -> None:
    if "wandb" in expected and shutil.which("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(ConfigError, match=expected):
        bench.train(tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_a_batch_embedding_needs_batches(bench: Bench, tmp_path: Path) -> None:
    file = bench.folder / "nobatch.toml"
    file.write_text(EXPERIMENT.replace('batch = "batch"\n', ""))
    experiment = load_experiment(file, ["model.batch_embedding=true"])
    with pytest.raises(ConfigError, match="has no batches"):
        train(experiment, prepare(experiment, tmp_path / "store"), tmp_path / "run")


def test_tensorboard_is_there_when_asked(bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = bench.train(tmp_path / "run", "train.steps=2", 'train.loggers=["tensorboard"]')
    assert list((run / "tensorboard").glob("events*"))
    assert verify_artefact(run) == []


def numbered_epoch(epoch: int, size: int) -> CellSets:
    numbers = np.arange(size, dtype=np.int32) + 1000 * epoch
    rows = numbers.astype(np.int64)[:, None]
    return CellSets(numbers, numbers, numbers, rows, rows)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 7), min_size=4, max_size=4), takes=st.lists(st.integers(1, 9), max_size=6))
def test_a_stream_goes_through_every_set_and_goes_on_from_any_place(sizes: list[int], takes: list[int]) -> None:
    def epoch_sets(epoch: int) -> CellSets:
        return numbered_epoch(epoch, sizes[epoch % 4])

    everything = np.concatenate([epoch_sets(epoch).pert for epoch in range(60)])
    stream, place, done = SetStream(epoch_sets, StreamState(0, 0)), StreamState(0, 0), 0
    for number in takes:
        sets, after = stream.take(number)
        fresh, same = SetStream(epoch_sets, place).take(number)
        assert after == same
        assert torch.equal(sets.host, fresh.host)
        assert torch.equal(sets.host, sets.device)
        assert sets.host[:, 0].tolist() == everything[done : done + number].tolist()
        place, done = after, done + number


def test_an_epoch_without_sets_is_an_error() -> None:
    with pytest.raises(DataError, match="no cell sets"):
        SetStream(lambda epoch: numbered_epoch(epoch, 0), StreamState(0, 0)).take(1)


def test_validation_cells_never_train(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pertcast.train.batches import SetReader

    store = Store.open(bench.store())
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    read = SetReader.fetch

    def spy(self: SetReader, sets: Codes) -> Any:
        rows = set(sets.host[:, 3:].flatten().tolist())
        flags = set(store.split[sorted(rows)].tolist())
        assert len(flags) == 1
        seen[flags == {int(Split.TRAIN)}] |= rows
        return read(self, sets)

    monkeypatch.setattr(SetReader, "fetch", spy)
    bench.train(tmp_path / "run")
    assert seen[True] == set(store.rows(split=Split.TRAIN).tolist())
    assert seen[False] == set(store.rows(split=Split.VAL).tolist())


def test_each_term_is_logged_and_weighs_what_it_should(bench: Bench, tmp_path: Path) -> None:
    run = bench.train(tmp_path / "run", *ALL_TERMS)
    for kind in ("train", "val"):
        for entry in lines(run, kind):
            share = min(1.0, entry["step"] / 5) if kind == "train" else 1.0
            expected = entry["energy"] + share * (10 * entry["mae"] + 0.2 * entry["de"] + entry["rank"])
            assert entry["loss"] == pytest.approx(expected, rel=1e-5)
            assert min(entry[name] for name in ("energy", "mae", "de", "rank")) > 0


def test_a_learned_de_head_lies_in_the_run_and_nobody_else_needs_it(bench: Bench, tmp_path: Path) -> None:
    run = bench.train(tmp_path / "run", *ALL_TERMS, "loss.de_head=learned")
    names = {name for name in load_file(run / "weights.safetensors") if name.startswith("de_head.")}
    assert len(names) == 5
    model = open_run(run).model()
    assert not names & model.state_dict().keys()
    assert open_run(run).spec == open_run(bench.train(tmp_path / "plain", "train.steps=1")).spec


def test_feature_noise_changes_training_and_goes_on_to_the_bit(bench: Bench, tmp_path: Path) -> None:
    noisy = "train.feature_noise=0.5"
    whole = bench.train(tmp_path / "whole", noisy)
    plain = load_file(bench.train(tmp_path / "plain") / "weights.safetensors")
    assert not torch.equal(
        load_file(whole / "weights.safetensors")["pert_encoder.0.weight"], plain["pert_encoder.0.weight"]
    )
    with pytest.raises(KeyboardInterrupt):
        bench.train(tmp_path / "run", noisy, progress=Watcher(6, interrupt))
    assert_same_run(bench.train(tmp_path / "run", noisy), whole)


def test_an_embedding_trains_with_every_term(bench: Bench, tmp_path: Path) -> None:
    store = ["model.input=obsm:X_small"]
    run = bench.train(tmp_path / "run", "train.steps=3", *ALL_TERMS, store=store)
    assert {"energy", "decoder", "mae", "de", "rank"} < lines(run)[-1].keys()


def test_one_auxiliary_term_alone_trains(bench: Bench, tmp_path: Path) -> None:
    for term in ("mae", "de", "rank"):
        overrides = ("train.steps=2", "loss.energy=0", f"loss.{term}=1", "loss.rank_margin=1")
        entry = lines(bench.train(tmp_path / term, *overrides))[-1]
        assert entry[term] > 0
        assert entry["grad_norm"] > 0


def test_a_run_of_the_previous_version_is_resumed(bench: Bench, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        bench.train(out, progress=Watcher(6, interrupt))
    begun = json.loads((out / "training.json").read_text())
    begun["train"]["unknown_batch"] = begun["train"].pop("batch_dropout")
    begun["loss"]["mae_of"] = "effect"
    (out / "training.json").write_text(json.dumps(begun))
    with pytest.raises(CheckpointError, match=r"loss\.mae"):
        bench.train(out, "loss.mae=1")
    assert_same_run(bench.train(out), whole)
