from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import pertcast.train.precision as precision_module
from pertcast.config import Experiment, load_experiment
from pertcast.data.prepare import prepare
from pertcast.errors import CheckpointError, ConfigError
from pertcast.models.run_folder import open_run
from pertcast.models.transformer import Backbone
from pertcast.progress import SILENT
from pertcast.train import train
from pertcast.train.precision import native_precision, require_one_precision, resolve_precision
from workspace import Workspace, make_workspace

needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this processor"
)
BF16 = 2.0**-8


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def with_gradients(work: Any, values: list[Tensor], outer: Tensor) -> list[Tensor]:
    leaves = [value.clone().requires_grad_() for value in values]
    output = work(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, outer)]


def assert_near(found: list[Tensor], expected: list[Tensor], share: float) -> None:
    for one, two in zip(found, expected, strict=True):
        assert one.shape == two.shape
        assert (one.float() - two).norm() <= share * two.norm()


def slow_attention(values_BSH: Tensor, *weights: Tensor, head_dim: int) -> Tensor:
    sets = []
    for cells_SH in values_BSH:
        heads = []
        for first in range(0, len(weights[0]), head_dim):
            head = slice(first, first + head_dim)
            q, k, v = (cells_SH @ weight[head].T for weight in weights)
            heads.append(torch.softmax(q @ k.T / head_dim**0.5, dim=-1) @ v)
        sets.append(torch.cat(heads, dim=-1))
    return torch.stack(sets)


def slow_norm(values: Tensor, weight: Tensor) -> Tensor:
    return values / (values.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def slow_layer(cells_BSH: Tensor, *weights: Tensor, head_dim: int) -> Tensor:
    first_norm, query, key, value, output, second_norm, gate, up, down, last_norm = weights
    attended = slow_attention(slow_norm(cells_BSH, first_norm), query, key, value, head_dim=head_dim)
    cells_BSH = cells_BSH + attended @ output.T
    normed = slow_norm(cells_BSH, second_norm)
    cells_BSH = cells_BSH + (functional.silu(normed @ gate.T) * (normed @ up.T)) @ down.T
    return slow_norm(cells_BSH, last_norm)


LAYER = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@pytest.mark.parametrize(("sets", "size", "heads", "head_dim"), [(3, 16, 4, 12), (1, 1, 1, 8), (2, 33, 2, 20)])
@pytest.mark.parametrize("short", [False, pytest.param(True, marks=needs_bf16)])
def test_a_backbone_is_the_slow_one(sets: int, size: int, heads: int, head_dim: int, short: bool) -> None:
    torch.manual_seed(0)
    backbone = Backbone(24, 1, heads=heads, head_dim=head_dim, feedforward=40)
    parameters = [backbone.get_parameter(f"layers.0.{name}.weight") for name in LAYER] + [backbone.norm.weight]
    cells = drawn(sets, size, 24).requires_grad_()
    outer = drawn(sets, size, 24, seed=99)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=short):
        found = backbone(cells)
    assert found.dtype == torch.float32
    gradients = torch.autograd.grad(found, [cells, *parameters], outer)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    twin = [value.detach().clone() for value in (cells, *parameters)]
    expected = with_gradients(lambda *values: slow_layer(*values, head_dim=head_dim), twin, outer)
    if size == 1:  # one cell has all of its own attention: no gradient reaches queries and keys
        assert gradients[2].abs().max() < BF16
        assert gradients[3].abs().max() < BF16
        gradients, expected = gradients[:2] + gradients[4:], expected[:3] + expected[5:]
    assert_near([found.detach(), *gradients], expected, 6 * BF16 if short else 1e-5)


@needs_bf16
def test_a_backbone_under_autocast_is_near_to_float32() -> None:
    torch.manual_seed(0)
    backbone = Backbone(48, 2, heads=4, head_dim=12, feedforward=96)
    parameters = list(backbone.parameters())

    def results(*, short: bool) -> list[Tensor]:
        cells = drawn(4, 16, 48).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=short):
            output = backbone(cells)
        assert output.dtype == torch.float32
        return [output.detach(), *torch.autograd.grad(output, [cells, *parameters], drawn(4, 16, 48, seed=5))]

    exact, brief = results(short=False), results(short=True)
    errors = torch.stack([(one - two).norm() / two.norm() for one, two in zip(brief, exact, strict=True)])
    assert 0 < errors.mean() < 0.04


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = make_workspace(tmp_path_factory.mktemp("precision") / "w")
    prepare(load_experiment(workspace.experiment), workspace.folder / "store")
    return workspace


class Notes:
    """A progress that keeps what is noted."""

    task, table = SILENT.task, SILENT.table

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def experiment_of(workspace: Workspace, *overrides: str) -> Experiment:
    return load_experiment(workspace.experiment, ("train.val_every=2", "train.precision=auto", *overrides))


@pytest.mark.parametrize(("is_native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_what_the_device_multiplies_natively_and_a_run_keeps_it(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_native: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(precision_module, "_cpu_multiplies_bf16", lambda: is_native)
    store, out, progress = workspace.folder / "store", tmp_path / "run", Notes()
    train(experiment_of(workspace, "train.steps=2"), store, out, progress=progress)
    assert any(note.startswith(f'train.precision = "auto": {expected}') for note in progress.notes)
    assert open_run(out).experiment["train"]["precision"] == expected
    assert json.loads((out / "training.json").read_text())["train"]["precision"] == expected
    monkeypatch.setattr(precision_module, "_cpu_multiplies_bf16", lambda: not is_native)
    train(experiment_of(workspace, "train.steps=4"), store, out)
    assert open_run(out).experiment["train"]["precision"] == expected
    other = "fp32" if is_native else "bf16"
    with pytest.raises(CheckpointError, match=f"train.precision.*begun with '{expected}', got '{other}'"):
        train(experiment_of(workspace, "train.steps=6", f"train.precision={other}"), store, out)


def test_a_precision_that_is_asked_for_is_taken(workspace: Workspace, tmp_path: Path) -> None:
    for asked in ("fp32", "tf32", "bf16"):
        experiment = experiment_of(workspace, f"train.precision={asked}")
        assert resolve_precision(experiment, tmp_path) == (experiment, ())


def test_devices_without_bfloat16_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert [native_precision(name) for name in ("auto", "gpu", "cuda", "tpu")] == ["fp32"] * 4
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert [native_precision(name) for name in ("auto", "gpu", "cuda")] == ["bf16"] * 3


def test_processes_that_would_compute_differently_are_refused() -> None:
    class FirstOfAll:
        global_rank = 1

        def broadcast(self, _precision: str) -> str:
            return "bf16"

    require_one_precision(FirstOfAll(), "bf16")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r'first process computes in bf16.*process 1 would in fp32.*"fp32"'):
        require_one_precision(FirstOfAll(), "fp32")  # type: ignore[arg-type]


@needs_bf16
def test_losses_in_bf16_are_those_in_float32_but_for_rounding(workspace: Workspace, tmp_path: Path) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        train(
            experiment_of(workspace, "train.steps=4", f"train.precision={precision}"), workspace.folder / "store", out
        )
        losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    exact, brief = losses
    assert exact != brief
    assert brief == pytest.approx(exact, rel=2 * BF16)
