from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pertcast.config import Experiment, TrainConfig, load_experiment, rung_overrides
from pertcast.data.features import load_features
from pertcast.data.store import Store
from pertcast.errors import ConfigError
from pertcast.files.artefacts import verify_artefact
from pertcast.files.resources import prefetch
from pertcast.generate import Part, generate
from pertcast.generate.parts import own_share
from pertcast.models.heads import SetDropout, dropout_keys, dropouts_of, key_dropout
from pertcast.models.run_folder import open_run
from pertcast.train import train
from pertcast.train.batches import SetReader, SetStream, StreamState
from pertcast.train.devices import open_fabric
from workspace import Workspace, assert_same_metrics, metrics, prepared_workspace

EVERY_TERM = (
    *rung_overrides("c4"),
    "loss.rank_margin=0.5",
    "loss.warmup_steps=5",
    "train.sets_per_step=4",
    "train.precision=fp32",
)
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class Interrupter:
    """A progress that keeps what it is told, and sends SIGINT once after a step."""

    def __init__(self, at_step: int) -> None:
        self.at_step, self.notes, self.begun_at = at_step, list[str](), -1

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Any]:
        step = self.begun_at = done if label == "train" else self.begun_at

        def advance(amount: int, detail: str = "") -> None:
            nonlocal step
            step += amount
            if label == "train" and amount and step == self.at_step:
                signal.raise_signal(signal.SIGINT)

        yield advance

    def note(self, text: str) -> None:
        self.notes.append(text)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Do nothing."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return prepared_workspace(tmp_path_factory.mktemp("devices") / "w")


def experiment_of(workspace: Workspace, *overrides: str) -> Experiment:
    return load_experiment(workspace.experiment, (*EVERY_TERM, *overrides))


@pytest.fixture(scope="module")
def alone(workspace: Workspace) -> Path:
    """The run of one process: every term of the loss, dropout, and validation sets that two cannot share equally."""
    return train(experiment_of(workspace), workspace.folder / "store", workspace.folder / "alone")


def test_two_processes_have_the_losses_of_one_and_stop_together_and_one_goes_on(
    workspace: Workspace, alone: Path, tmp_path: Path
) -> None:
    assert open_run(alone).experiment["model"]["dropout"] == 0.1
    experiment, store = experiment_of(workspace, "train.devices=2"), workspace.folder / "store"
    out, watcher = tmp_path / "run", Interrupter(at_step=8)
    with pytest.raises(KeyboardInterrupt):
        train(experiment, store, out, progress=watcher)
    stopped = metrics(out)[-1]["step"]
    assert watcher.notes[-1] == f"stopped at step {stopped}; run the same command again to resume"
    assert 8 <= stopped < 12
    watcher = Interrupter(at_step=-1)
    assert train(experiment_of(workspace), store, out, progress=watcher) == out
    assert watcher.begun_at == stopped
    assert_same_metrics(out, alone)
    assert verify_artefact(out) == []
    assert not list(tmp_path.glob(".*"))
    weights, others = (open_run(path).model().state_dict() for path in (out, alone))
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-3, atol=1e-5)


def commands(workspace: Workspace, out: Path, *overrides: str) -> list[str]:
    settings = [word for override in (*EVERY_TERM, *overrides) for word in ("--set", override)]
    store = str(workspace.folder / "store")
    return ["-m", "pertcast", "train", str(workspace.experiment), "--store", store, "--out", str(out), *settings]


def test_a_run_of_one_process_goes_on_with_two_under_torchrun(
    workspace: Workspace, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(experiment_of(workspace, "train.steps=8"), workspace.folder / "store", out)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, *commands(workspace, out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(out)]
    assert done.stderr.count("train: 12 steps, 8 steps done already") == 1
    assert_same_metrics(out, alone)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_generate_what_one_does_and_go_on_under_torchrun(
    workspace: Workspace, alone: Path, tmp_path: Path
) -> None:
    expected = contents(generate(alone, tmp_path / "one"))
    parts = generate(alone, tmp_path / "two", devices=2)
    assert contents(parts) == expected
    # What a kill leaves behind: a part without its manifest, one that is half written, no manifest of the whole.
    (parts / "H1" / "G1.h5ad.manifest.json").unlink()
    (parts / "H1" / "G2.h5ad").write_bytes(b"half")
    (parts / "H1" / ".G3.h5ad.partial-00000000").write_bytes(b"half")
    (parts / "H1" / "OLD.h5ad").write_bytes(b"of an earlier plan")
    (parts / "manifest.json").unlink()
    kept = (parts / "H1" / "G3.h5ad").stat().st_mtime_ns
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "pertcast", "generate", str(alone), "--out", str(parts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(parts)]
    assert contents(parts) == expected
    assert (parts / "H1" / "G3.h5ad").stat().st_mtime_ns == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@given(sizes=st.lists(st.integers(1, 1000), max_size=30), size=st.integers(1, 5))
def test_each_part_has_one_maker_and_makers_have_about_equally_many_cells(sizes: list[int], size: int) -> None:
    parts = [Part(f"{number}", "small", "H1", f"{number}", cells) for number, cells in enumerate(sizes)]
    shares = [own_share(parts, rank=rank, size=size) for rank in range(size)]
    assert sorted(part.file for share in shares for part in share) == sorted(part.file for part in parts)
    loads = [sum(part.num_cells for part in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_srun_says_which_process_it_is_and_one_speaks_for_all(workspace: Workspace, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    step = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}
    base = {**os.environ, **step, "SLURM_JOB_ID": "77", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    out = tmp_path / "run"
    diverging = ("train.learning_rate=1e37", "train.clip=0")
    processes = [
        subprocess.Popen(
            [sys.executable, *commands(workspace, out, *diverging)],
            env={**base, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first = processes[0].communicate()[1]
    assert processes[0].returncode == 1
    assert "training has diverged" in first
    processes[1].terminate()  # as srun --kill-on-bad-exit does
    assert processes[1].communicate()[1] == ""
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("environment", "overrides", "expected"),
    [
        ("", ["train.devices=3"], "multiple of devices = 3, got 4"),
        ("", ["train.num_nodes=2"], "2 machines need a launcher"),
        ("1 2 1 2", ["train.devices=4"], "torchrun has started 2, got 4"),
        ("1 4 1 2", ["train.num_nodes=4", "train.devices=2"], "num_nodes: torchrun has started 2, got 4"),
        ("1 3 1 3", [], "multiple of devices = 3, got 4"),
    ],
)
def test_what_the_devices_cannot_do_is_said(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: str,
    overrides: list[str],
    expected: str,
) -> None:
    for name, value in zip(LAUNCHERS, environment.split(), strict=False):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=expected):
        train(experiment_of(workspace, *overrides), workspace.folder / "store", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_dropout_of_a_set_is_its_own_in_any_batch() -> None:
    network = nn.Sequential(SetDropout(0.25), nn.Identity(), SetDropout(0.25))
    keys = dropout_keys(0, [("train", 3, place) for place in range(6)])
    values = torch.ones(6, 50, 40)
    key_dropout(dropouts_of(network), keys)
    both = network(values)
    key_dropout(dropouts_of(network), keys[1::2])
    torch.testing.assert_close(network(values[1::2]), both[1::2], rtol=0, atol=0)
    first = network[0](values[1::2])
    assert first.unique().tolist() == [0, pytest.approx(1 / 0.75)]
    dropped = torch.stack([first == 0, network[2](values[1::2]) == 0]).flatten(1).numpy()
    np.testing.assert_allclose(dropped.mean(), 0.25, atol=0.01)
    # Layers and sets know nothing of each other.
    assert abs(np.corrcoef(dropped)[0, 1]) < 0.05
    assert np.abs(np.corrcoef(dropped[0].reshape(3, -1)) - np.eye(3)).max() < 0.06
    key_dropout(dropouts_of(network), None)
    assert not torch.equal(network(values), network(values))
    network.eval()
    assert torch.equal(network(values), values)


@pytest.mark.filterwarnings("ignore")  # of torch about itself
def test_a_compiled_training_has_the_same_losses(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, but for machine code: that takes a minute here, and benchmarks/gpu.py has it made."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    overrides = ("train.steps=3", "model.layers=1", "loss.rank=0", "train.val_every=3")
    runs = [
        train(experiment_of(workspace, *overrides, *more), workspace.folder / "store", tmp_path / name)
        for name, more in (("plain", ()), ("compiled", ("train.compile=true", "train.precision=tf32")))
    ]
    assert_same_metrics(runs[1], runs[0])
    assert torch.get_float32_matmul_precision() == "highest"


def test_bf16_rounds_products_and_not_what_goes_in(tmp_path: Path) -> None:
    class Probe(nn.Linear):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            seen.append((values.dtype, super().forward(values).dtype))
            return values + super().forward(values) * 0

    seen: list[Any] = []
    config = TrainConfig(precision="bf16", accelerator="cpu")
    model = open_fabric(config, tmp_path).setup_module(Probe(4, 4))
    values = torch.full((1, 4), 1 + 2**-12)
    assert torch.equal(model(values), values)
    assert seen == [(torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("source", ["hvg", "genes"])
def test_batches_are_the_same_bits_however_they_travel_and_are_read(workspace: Workspace, source: str) -> None:
    experiment = experiment_of(workspace, f"model.input={source}", "model.output=hvg")
    store = Store.open(workspace.folder / "store")
    features = load_features(experiment.features, store, targets=())
    taken = []
    for way in ("dense", "packed", "resident"):
        reader = SetReader(store, experiment, features)
        reader.place(torch.device("cpu"), "device" if way == "resident" else "host")
        if way == "packed":  # what a GPU gets for each batch if its memory does not hold all cells
            for cells in (reader._inputs, reader._genes):
                cells.place(torch.device("cpu"), "packed")
        stream = SetStream(reader.training, StreamState(0, 0))
        pieces = (stream.take(3) for _ in range(7))
        batches = [(reader.batch(codes.device, found), place) for codes, found, place in reader.batches(pieces)]
        assert len(batches) == 7
        taken.append(batches)
    for others in taken[1:]:
        for (batch, place), (other, other_place) in zip(taken[0], others, strict=True):
            assert place == other_place
            for one, two in zip(batch, other, strict=True):
                assert one is two is None or torch.equal(one, two)  # type: ignore[arg-type]


@given(num=st.integers(0, 12), threads=st.integers(1, 4), stop=st.integers(0, 12), broken=st.integers(0, 20))
def test_work_ahead_keeps_the_order_and_passes_errors_on_in_their_turn(
    num: int, threads: int, stop: int, broken: int
) -> None:
    def work(number: int) -> int:
        if number == broken:
            raise ValueError("in its turn")
        return number

    seen: list[int] = []
    fails = broken < min(num, stop + 1)
    results = prefetch(range(num), work, threads=threads)
    with pytest.raises(ValueError, match="in its turn") if fails else nullcontext(), closing(results):  # type: ignore[type-var]
        for number in results:
            seen.append(number)
            if number == stop:
                break
    assert seen == list(range(min(num, stop + 1, broken)))


def test_what_was_worked_ahead_is_not_held_once_the_caller_lets_go_of_it() -> None:
    results = prefetch(range(3), lambda number: np.full(4, number))
    first = next(results)
    held = weakref.ref(first)
    del first
    assert held() is None
    assert [int(result[0]) for result in results] == [1, 2]
