"""A network that is shared out over two processes trains, validates, stops and goes on as on one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import pertcast
from pertcast.config import Experiment, load_experiment, rung_overrides
from pertcast.data.prepare import prepare
from pertcast.errors import ConfigError
from pertcast.files.artefacts import verify_artefact
from pertcast.models.run_folder import open_run
from pertcast.processes import run_processes
from pertcast.progress import SILENT
from pertcast.train import train
from pertcast.train.adapt import adapt
from workspace import Workspace, assert_same_metrics, make_workspace, metrics

# Every term, every kind of parameter (embeddings, a token of one row, heads), dropout, and gradients that are clipped.
EVERYTHING = (
    *rung_overrides("c4"), "loss.nb=0.1", "loss.rank_margin=0.5", "loss.warmup_steps=5", "train.sets_per_step=4",
    "model.batch_embedding=true", "model.context_embedding=true", "model.dropout=0.1", "train.clip=1.0",
    "train.precision=fp32",
)  # fmt: skip
SHARDED = ("train.devices=2", "train.strategy=fsdp")


class Interrupter:
    """A progress that sends SIGINT once after a step."""

    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Any]:
        step = done

        def advance(amount: int, detail: str = "") -> None:
            nonlocal step
            step += amount
            if label == "train" and amount and step == self.at_step:
                signal.raise_signal(signal.SIGINT)

        yield advance

    def note(self, text: str) -> None:
        """Do nothing."""

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Do nothing."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = make_workspace(tmp_path_factory.mktemp("sharding") / "w")
    cells = ad.read_h5ad(workspace.data)
    cells.obsm["X_small"] = np.log1p(cells.X.toarray()[:, :5]).astype(np.float32) - 2
    cells.write_h5ad(workspace.data)
    prepare(load_experiment(workspace.experiment), workspace.folder / "store")
    return workspace


def experiment_of(workspace: Workspace, *overrides: str) -> Experiment:
    return load_experiment(workspace.experiment, (*EVERYTHING, *overrides))


@pytest.fixture(scope="module")
def alone(workspace: Workspace) -> Path:
    return train(experiment_of(workspace), workspace.folder / "store", workspace.folder / "alone")


def assert_same_tensors(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert tensors.keys() == others.keys()
    for name, value in tensors.items():
        assert torch.allclose(value, others[name], rtol=1e-3, atol=1e-5), name


def test_two_processes_with_half_a_network_each_do_as_one_and_one_goes_on(
    workspace: Workspace, alone: Path, tmp_path: Path
) -> None:
    steps = [entry for entry in metrics(alone) if entry["kind"] == "train"]
    assert sum(entry["grad_norm"] > 1 for entry in steps) > 3  # so that clipping by the global norm is tested, too
    out, store = tmp_path / "run", workspace.folder / "store"
    with pytest.raises(KeyboardInterrupt):
        train(experiment_of(workspace, *SHARDED), store, out, progress=Interrupter(at_step=8))
    assert 8 <= metrics(out)[-1]["step"] < 12
    train(experiment_of(workspace), store, out)
    assert_same_metrics(out, alone)
    assert verify_artefact(out) == []
    assert_same_tensors(*(open_run(run).model().state_dict() for run in (out, alone)))


def test_one_process_begins_and_two_go_on_with_half_a_network_each(
    workspace: Workspace, alone: Path, tmp_path: Path
) -> None:
    out, store = tmp_path / "run", workspace.folder / "store"
    with pytest.raises(KeyboardInterrupt):
        train(experiment_of(workspace), store, out, progress=Interrupter(at_step=6))
    settings = [word for override in (*EVERYTHING, "train.strategy=fsdp") for word in ("--set", override)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "pertcast", "train", str(workspace.experiment), "--store", str(store), "--out", str(out)]
    done = subprocess.run([*launcher, *command, *settings], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_metrics(out, alone)
    assert verify_artefact(out) == []
    for name in ("weights", "checkpoints/step_000000012/best", "checkpoints/step_000000012/optimizer"):
        assert (out / f"{name}.safetensors").is_file() == (alone / f"{name}.safetensors").is_file()
        if (out / f"{name}.safetensors").is_file():
            assert_same_tensors(*(load_file(run / f"{name}.safetensors") for run in (out, alone)))
    assert open_run(out).metrics == open_run(alone).metrics | {
        "val_loss": pytest.approx(open_run(alone).metrics["val_loss"])
    }


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.precision=bf16", "train.accumulate=2"),
        ("model.input=obsm:X_small", "loss.de=0", "loss.rank=0", "loss.nb=0"),
        ('model.residual="shift"', "model.base=mean", "train.select_by=overall", "loss.nb=0"),
    ],
)
def test_other_ways_to_train_are_the_same_with_half_a_network(
    workspace: Workspace, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    overrides = ("train.steps=4", "train.val_every=2", *overrides)
    store = prepare(experiment_of(workspace, *overrides), tmp_path / "store")
    runs = [
        train(experiment_of(workspace, *overrides, *more), store, tmp_path / name)
        for name, more in (("one", ()), ("two", SHARDED))
    ]
    assert_same_metrics(*runs, rtol=1e-2 if "train.precision=bf16" in overrides else 1e-4)


def test_each_device_holds_its_part_of_weights_gradients_and_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(pertcast.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{source}:{Path(__file__).parents[1]}")
    run_processes("sharding_work:measure", {"out": str(tmp_path)}, num=2, progress=SILENT)
    parts = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    for part in parts:
        for kind in ("weights", "gradients", "exp_avg", "exp_avg_sq"):
            assert 0.45 < part[kind] / part["all"] < 0.55, kind
        # what comes together is as short as the products; norms, embeddings and what is kept are not
        assert part["seen"] == {"q_proj": "torch.bfloat16", "norm": "torch.float32"}
        assert part["kept"] == ["torch.float32"]
    assert sum(part["weights"] for part in parts) == parts[0]["all"]


def test_what_is_no_network_of_several_devices_is_refused(workspace: Workspace, alone: Path, tmp_path: Path) -> None:
    ridge = experiment_of(
        workspace, "model.kind=ridge", "train.strategy=fsdp", *(f"loss.{term}=0" for term in ("de", "rank", "nb"))
    )
    with pytest.raises(ConfigError, match=r'"fsdp" shards a network, but model\.kind = "ridge" is a baseline'):
        train(ridge, workspace.folder / "store", tmp_path / "run")
    with pytest.raises(ConfigError, match='an adaptation runs in one process, got "fsdp"'):
        adapt(alone, experiment_of(workspace, *SHARDED), workspace.folder / "store", tmp_path / "run")
    assert not (tmp_path / "run").exists()
