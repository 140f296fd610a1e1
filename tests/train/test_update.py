"""An update: its losses against a plain loop, what the host does in it, and numbers that are read late."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import SMALL_GENES, write_small_h5ad
from pertcast.config import Experiment, load_experiment
from pertcast.data.features import open_features
from pertcast.data.prepare import prepare
from pertcast.data.store import Store
from pertcast.data.store_arrays import StoredValues
from pertcast.errors import CheckpointError, ConfigError
from pertcast.files.h5ad import RangeFile
from pertcast.models.state import StateTransition
from pertcast.stats.draws import key_hash
from pertcast.train import train, update
from pertcast.train.batches import SetReader
from pertcast.train.loop import Loop
from pertcast.train.update import LateValues
from training_bench import EXPERIMENT, Watcher, lines
from workspace import Workspace, prepared_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return prepared_workspace(tmp_path_factory.mktemp("cells") / "w")


def experiment_of(workspace: Workspace, *overrides: str) -> Experiment:
    return load_experiment(workspace.experiment, overrides)


def plain_energy(pred_BSG: torch.Tensor, real_BSG: torch.Tensor) -> torch.Tensor:
    """The energy distance as its definition has it."""

    def mean_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a[:, :, None] - b[:, None]).square().sum(-1).clamp_min(1e-8).sqrt().mean((1, 2))

    within = mean_distance(pred_BSG, pred_BSG) + mean_distance(real_BSG, real_BSG)
    return mean_distance(pred_BSG, real_BSG) - within / 2


@pytest.mark.parametrize("cells", ["device", "host"])
def test_fifty_steps_have_the_losses_of_a_plain_loop(workspace: Workspace, tmp_path: Path, cells: str) -> None:
    overrides = ("model.dropout=0", "train.steps=50", "train.precision=fp32", f"train.cells={cells}")
    experiment = experiment_of(workspace, *overrides, "train.val_every=1000", "train.clip=0.5")
    store = Store.open(workspace.folder / "store")
    losses = [entry["loss"] for entry in lines(train(experiment, store.path, tmp_path / "run"))]

    features = open_features(tmp_path / "run" / "features")
    pert_PF = torch.from_numpy(features.of(store.perts)).clone()
    reader = SetReader(store, experiment, features)
    network = StateTransition(
        reader.spec, generator=torch.Generator().manual_seed(key_hash(experiment.train.seed, "init") % 2**63)
    )
    network.start_at_mean(torch.from_numpy(store.control_mean_log1p[reader.output_genes]))
    config = experiment.train
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    inputs = store.hvg if experiment.model.input == "hvg" else slice(None)

    def stream() -> Iterator[Any]:
        epoch = 0
        while True:
            sets = reader.training(epoch)
            yield from (sets[number : number + 1] for number in range(len(sets)))
            epoch += 1

    sets = stream()
    for step, loss in enumerate(losses):
        chosen = [next(sets) for _ in range(config.sets_per_step)]
        control, real = (
            torch.from_numpy(np.stack([store.csr(rows[0]).toarray() for rows in kind]))
            for kind in ([one.control_rows for one in chosen], [one.pert_rows for one in chosen])
        )
        perts = torch.tensor([int(one.pert[0]) for one in chosen])
        prediction = network(control[:, :, inputs], pert_PF[perts]).log1p_BSG
        expected = plain_energy(prediction, real[:, :, reader.output_genes]).mean()
        assert loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-5), step
        optimizer.zero_grad()
        expected.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimizer.step()


@pytest.mark.parametrize("kind", ["two panels", "log1p", "embedding", "shift on a base", "every term"])
def test_cells_on_the_device_train_as_those_of_the_host_on_all_kinds_of_data(tmp_path: Path, kind: str) -> None:
    scale = "log1p" if kind == "log1p" else "counts"
    cells = ad.read_h5ad(write_small_h5ad(tmp_path / "small.h5ad", scale=scale))
    cells.obsm["X_small"] = cells.X.toarray()[:, :5]
    cells.write_h5ad(tmp_path / "small.h5ad")
    text = EXPERIMENT
    if kind == "two panels":
        write_small_h5ad(tmp_path / "other.h5ad", genes=SMALL_GENES[:15], seed=1)
        text = text.replace('small = "small.h5ad"', 'small = "small.h5ad"\nother = "other.h5ad"')
        (tmp_path / "genes.csv").write_text("".join(f"{gene}\n" for gene in SMALL_GENES))
        text = text.replace(
            "[prepare]", '[submission]\ngenes = "genes.csv"\nrules.num_genes = 20\n[prepare]\nmissing_genes = "zero"'
        )
        text = text.replace('small = "train"', 'small = "train"\nother = "train"')
    (tmp_path / "experiment.toml").write_text(text)
    overrides = {
        "embedding": ("model.input=obsm:X_small",),
        "shift on a base": ("model.residual=shift", "model.base=mean"),
        "every term": ("loss.mae=10", "loss.de=0.2", "loss.rank=1", "model.batch_embedding=true", "train.accumulate=2"),
    }.get(kind, ())
    runs = []
    for where in ("host", "device"):
        experiment = load_experiment(tmp_path / "experiment.toml", [*overrides, f"train.cells={where}"])
        store = prepare(experiment, tmp_path / "store")
        assert (Store.open(store).measured_SG is not None) == (kind == "two panels")
        runs.append(train(experiment, store, tmp_path / where))
    assert (runs[0] / "metrics.jsonl").read_text() == (runs[1] / "metrics.jsonl").read_text()


def many_genes(folder: Path, num_genes: int) -> Path:
    """Write cells of so many genes, few of them seen in a cell."""
    random = np.random.default_rng(0)
    labels = np.repeat(["non-targeting", "g1", "g2", "g3"], 24)
    counts: Any = sparse.random(len(labels), num_genes, density=min(1, 40 / num_genes), format="csr", random_state=0)
    counts.data = random.integers(1, 9, size=counts.nnz).astype(np.float32)
    obs = pd.DataFrame(
        {"target_gene": pd.Categorical(labels), "cell_type": pd.Categorical(["H1"] * len(labels))},
        index=[f"c{cell}" for cell in range(len(labels))],
    )
    obs["batch"] = pd.Categorical(["b"] * len(labels))
    var = pd.DataFrame(index=[f"g{gene}" for gene in range(num_genes)])
    ad.AnnData(counts, obs, var).write_h5ad(folder / "small.h5ad")
    (folder / "experiment.toml").write_text(EXPERIMENT)
    return folder / "experiment.toml"


class LargeCopies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts copies of as many numbers as a batch of values has."""

    def __init__(self, smallest: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.smallest, self.found = smallest, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        copies = func.overloadpacket.__name__ in ("_to_copy", "copy_", "clone", "cat", "index", "index_select")
        if copies and result.numel() >= self.smallest:
            self.found += 1
        return result


@contextmanager
def counted_calls(counts: Counter[str]) -> Iterator[None]:
    def count(_frame: Any, event: str, _argument: Any) -> None:
        counts[event] += 1

    gc.collect()
    gc.disable()  # a collection calls what others have registered for it, at a time of its own
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)
        gc.enable()


def host_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_genes: int) -> tuple[Counter[str], int, int]:
    """Return the calls of Python, the large copies of batches, and the reads, in steps with cells on the device."""
    folder = tmp_path / str(num_genes)
    folder.mkdir()
    experiment = load_experiment(
        many_genes(folder, num_genes), ["train.cells=device", "train.val_every=1000", "train.checkpoint_every=1000"]
    )
    store = prepare(experiment, folder / "store")
    calls: Counter[str] = Counter()
    copies, reads = LargeCopies(8 * num_genes), 0
    take, batch = Loop._step, SetReader.batch

    def step(self: Loop, *arguments: Any) -> None:
        nonlocal reads

        def read(*_: Any, **__: Any) -> None:
            nonlocal reads
            reads += 1

        with monkeypatch.context() as patch:
            for owner, name in (
                *((StoredValues, name) for name in ("read", "write_log1p", "pack", "_announce")),
                *((RangeFile, name) for name in ("gather", "announce", "require_whole")),
            ):
                patch.setattr(owner, name, read)
            # the first steps import and compile; a new epoch draws its sets
            with counted_calls(calls) if self.state.step == 4 and self.state.offset else no_count():
                take(self, *arguments)

    def counted_batch(self: SetReader, *arguments: Any) -> Any:
        with copies:
            return batch(self, *arguments)

    monkeypatch.setattr(Loop, "_step", step)
    train(experiment, store, folder / "run", progress=Watcher())
    with monkeypatch.context() as patch:
        patch.setattr(SetReader, "batch", counted_batch)
        train(experiment, store, folder / "counted", progress=Watcher())
    monkeypatch.setattr(Loop, "_step", take)
    return calls, copies.found, reads


@contextmanager
def no_count() -> Iterator[None]:
    yield


def test_with_cells_on_the_device_the_host_neither_reads_nor_copies_and_genes_cost_it_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, few_copies, few_reads = host_work(tmp_path, monkeypatch, 64)
    many, many_copies, many_reads = host_work(tmp_path, monkeypatch, 18_080)
    assert few_reads == many_reads == 0
    assert few_copies == many_copies == 0
    assert few["call"] > 100
    assert few == many


def test_numbers_of_a_step_come_late_in_order_and_all_at_once_where_asked() -> None:
    late = LateValues(3)
    read = []
    for step in range(1, 9):
        late.add(step, 0.5, torch.tensor([float(step)]))
        read.append([place for place, _, _ in late.read()])
    assert read == [[], [], [], [1], [2], [3], [4], [5]]
    assert list(late.read(everything=True)) == [(6, 0.5, [6.0]), (7, 0.5, [7.0]), (8, 0.5, [8.0])]
    assert not list(late.read(everything=True))


def test_late_numbers_change_no_line_and_a_diverged_step_reaches_no_checkpoint(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = workspace.folder / "store"
    at_once = train(experiment_of(workspace), store, tmp_path / "at-once")
    monkeypatch.setattr("pertcast.train.loop.steps_late", lambda _device: update._STEPS_LATE)
    late = train(experiment_of(workspace), store, tmp_path / "late")
    assert (late / "metrics.jsonl").read_text() == (at_once / "metrics.jsonl").read_text()
    wild = experiment_of(workspace, "train.learning_rate=1e37", "train.clip=0", "train.checkpoint_every=4")
    with pytest.raises(CheckpointError, match=r"step [1-4]: .*(nan|inf).*no checkpoint yet"):
        train(wild, store, tmp_path / "wild")
    assert not list((tmp_path / "wild").glob("checkpoints/step_*"))


@pytest.mark.parametrize("fails_in", ["forward", "backward"])
def test_what_torch_cannot_compile_runs_eagerly_with_a_note_or_is_an_error_where_asked_for(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_in: str
) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, value: torch.Tensor) -> torch.Tensor:
            if fails_in == "forward":
                raise RuntimeError("no compiler")
            return value.clone()

        @staticmethod
        def backward(_ctx: Any, *_gradients: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no compiler")

    def broken(function: Any, **_: Any) -> Any:
        def run(*arguments: Any) -> Any:
            loss, terms = function(*arguments)
            return Fails.apply(loss), terms  # type: ignore[no-untyped-call]

        return run

    store, watcher = workspace.folder / "store", Watcher()
    plain = train(experiment_of(workspace), store, tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ConfigError, match=r"train.*compile.*no compiler"):
        train(experiment_of(workspace, "train.compile=true"), store, tmp_path / "asked")
    monkeypatch.setattr(update.Update, "_compiles_at", lambda self, step: step >= 5 and self._can_compile)
    run = train(experiment_of(workspace), store, tmp_path / "auto", progress=watcher)
    assert any("eager operations, because torch cannot compile" in note for note in watcher.notes)
    assert (run / "metrics.jsonl").read_text() == (plain / "metrics.jsonl").read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("overrides", [(), ("loss.mae=1", "loss.rank=1"), ("train.compile=true",)])
def test_a_graph_has_the_losses_of_eager_steps(
    workspace: Workspace, tmp_path: Path, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("train.steps=20", "train.accelerator=gpu", "train.precision=fp32", *overrides)
    store = workspace.folder / "store"
    watcher = Watcher()
    graph = train(experiment_of(workspace, *settings), store, tmp_path / "graph", progress=watcher)
    assert any("one CUDA graph" in note for note in watcher.notes)
    assert not any("because" in note for note in watcher.notes)
    monkeypatch.setattr(update, "_EAGER_UPDATES", 1000)
    eager = train(experiment_of(workspace, *settings), store, tmp_path / "eager")
    for one, other in zip(lines(graph), lines(eager), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
