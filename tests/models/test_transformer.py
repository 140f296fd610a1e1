"""The backbones treat cells as they should: exchangeable, or one after the other as GPT-2's do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pertcast.models.transformer import Backbone, Gpt2Backbone

SHAPE = {"heads": 2, "head_dim": 8, "feedforward": 24}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(kind: type[Backbone | Gpt2Backbone], layers: int = 2) -> Backbone | Gpt2Backbone:
    torch.manual_seed(0)
    return kind(16, layers, **SHAPE).double().eval()


def slow_norm(values: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = values - values.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + 1e-5).sqrt() * norm.weight + norm.bias


def slow_gpt2(cells_BSH: Tensor, backbone: Any) -> Tensor:
    """One cell, one head and one earlier cell at a time."""
    for layer in backbone.h:
        normed = slow_norm(cells_BSH, layer.ln_1)
        projected = normed @ layer.attn.c_attn.weight.T + layer.attn.c_attn.bias
        query, key, value = projected.chunk(3, dim=-1)
        attended = torch.zeros_like(query)
        for b in range(len(cells_BSH)):
            for cell in range(cells_BSH.shape[1]):
                for first in range(0, query.shape[-1], 8):
                    head = slice(first, first + 8)
                    scores = [float(query[b, cell, head] @ key[b, seen, head]) / 8**0.5 for seen in range(cell + 1)]
                    weights = [math.exp(score) for score in scores]
                    for seen, weight in enumerate(weights):
                        attended[b, cell, head] += weight / sum(weights) * value[b, seen, head]
        cells_BSH = cells_BSH + attended @ layer.attn.c_proj.weight.T + layer.attn.c_proj.bias
        hidden = slow_norm(cells_BSH, layer.ln_2) @ layer.mlp.c_fc.weight.T + layer.mlp.c_fc.bias
        gelu = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        cells_BSH = cells_BSH + gelu @ layer.mlp.c_proj.weight.T + layer.mlp.c_proj.bias
    return slow_norm(cells_BSH, backbone.ln_f)


@torch.no_grad()
def test_gpt2_is_the_slow_one() -> None:
    backbone, cells = make(Gpt2Backbone), drawn(2, 5, 16)
    torch.testing.assert_close(backbone(cells), slow_gpt2(cells, backbone))


@torch.no_grad()
def test_cells_of_a_set_are_exchangeable() -> None:
    backbone, cells = make(Backbone), drawn(3, 6, 16)
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    torch.testing.assert_close(backbone(cells[:, order]), backbone(cells)[:, order])
    # and every cell sees every other
    changed = cells.clone()
    changed[:, 5] += 1
    assert ((backbone(changed) - backbone(cells)).abs().amax(-1) > 1e-6).all()


@torch.no_grad()
def test_a_gpt2_cell_sees_those_before_it_alone() -> None:
    backbone, cells = make(Gpt2Backbone), drawn(3, 6, 16)
    changed = cells.clone()
    changed[:, 3] += drawn(16, seed=4)
    difference = (backbone(changed) - backbone(cells)).abs().amax(-1)
    assert (difference[:, :3] == 0).all()
    assert (difference[:, 3:] > 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", [Backbone, Gpt2Backbone])
def test_sets_do_not_see_each_other(kind: type[Backbone | Gpt2Backbone]) -> None:
    backbone, cells = make(kind), drawn(3, 4, 16)
    changed = cells.clone()
    changed[1] = drawn(4, 16, seed=7)
    difference = (backbone(changed) - backbone(cells)).abs().amax((1, 2))
    assert (difference[[0, 2]] < 1e-12).all()
    assert difference[1] > 1e-3
    assert backbone(cells).shape == cells.shape


def test_rms_normalised_outputs_have_size_one() -> None:
    output = make(Backbone)(drawn(2, 4, 16, seed=3) * 100)
    torch.testing.assert_close(output.square().mean(-1), torch.ones(2, 4, dtype=torch.float64), atol=1e-4, rtol=1e-4)
    assert output.requires_grad
