from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pertcast.models.folded import FoldedNetwork
from pertcast.models.state import StateTransition
from small_networks import inputs, tiny_spec

WIDE = {"input_dim": 64, "output_dim": 64, "num_genes": 64}


def network(settings: dict[str, Any], changes: dict[str, Any]) -> StateTransition:
    """Return a network with weights that are not 0; the same one each time."""
    generator = torch.Generator().manual_seed(1)
    made = StateTransition(replace(tiny_spec(**settings), **changes), generator=generator)
    with torch.no_grad():
        for value in made.parameters():
            value.add_(torch.empty_like(value).normal_(0, 0.05, generator=generator))
    return made.eval()


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {}),
        ({"residual": "none"}, {}),
        ({"residual": "shift"}, {}),
        ({"residual": "shift"}, {"on_base": True}),
        ({}, {"bottleneck": True, **WIDE}),
        ({"residual": "none"}, {"bottleneck": True, **WIDE}),
        ({"batch_embedding": True, "context_embedding": True}, {"basal_layers": 2, "confidence_token": True}),
        ({}, {"backbone": "gpt2", "batch_token": True}),
        ({"input": "obsm:X"}, {}),
    ],
)
def test_the_values_are_those_of_the_network(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    plain = network(settings, changes)
    control_BSI, *others = inputs(plain.spec)
    base_BG = torch.rand(2, plain.spec.num_genes) if plain.spec.on_base else None
    with torch.inference_mode():
        expected = plain(control_BSI, *others, base_BG)
    folded = FoldedNetwork(network(settings, changes))
    codes = folded.encode(control_BSI.flatten(0, 1))
    assert codes.shape[-1] == folded.code_width
    found = folded.predict(codes.reshape(2, -1, folded.code_width), *others, base_BG=base_BG, control_BSI=control_BSI)
    assert expected.unclipped_BSG.abs().max() > 0.1
    assert (found.unclipped_BSG - expected.unclipped_BSG).abs().max() < 1e-5
    if expected.confidence_B is not None:
        torch.testing.assert_close(found.confidence_B, expected.confidence_B)
