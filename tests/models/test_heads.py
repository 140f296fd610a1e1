from __future__ import annotations

import pytest
import torch

from pertcast.errors import ConfigError
from pertcast.models.heads import DeHead
from pertcast.models.state import StateTransition
from small_networks import inputs, tiny_spec


def test_the_de_head_starts_at_the_size_of_the_effect_and_is_linear_in_the_normed_state() -> None:
    head = DeHead(4, 3)
    head.start()
    pooled, effect = torch.randn(2, 4), torch.tensor([[0.1, -0.2, 0.0], [0.0, 0.3, -0.4]])
    torch.testing.assert_close(head(pooled, effect), 10 * effect.abs())
    with torch.no_grad():
        head.state.weight.copy_(torch.arange(12.0).reshape(3, 4))
        head.state.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    for b in range(2):
        centred = pooled[b] - pooled[b].mean()
        normed = centred / (centred.square().mean() + 1e-5).sqrt()
        for g in range(3):
            expected = head.state.weight[g] @ normed + head.state.bias[g] + 10 * effect[b, g].abs()
            torch.testing.assert_close(head(pooled, effect)[b, g], expected)


def test_predictions_are_the_same_with_the_head_and_its_gradient_reaches_the_cells() -> None:
    spec = tiny_spec()
    model = StateTransition(spec).eval()
    control, pert, _, _ = inputs(spec)
    without = model(control, pert)
    assert without.de_BG is None
    model.add_de_head()
    assert model(control, pert).de_BG is None
    prediction = model(control, pert, control_mean_BG=torch.full((2, 9), 0.5))
    assert torch.equal(prediction.log1p_BSG, without.log1p_BSG)
    assert prediction.de_BG is not None
    (gradient,) = torch.autograd.grad(prediction.de_BG.sum(), prediction.log1p_BSG)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0
    names = {name.partition(".")[0] for name in model.state_dict()} - {
        name.partition(".")[0] for name in StateTransition(spec).state_dict()
    }
    assert names == {"de_head"}


def shifting() -> StateTransition:
    model = StateTransition(tiny_spec(residual="shift")).eval()
    model.set_control_feature(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    return model


def test_a_shift_starts_at_the_control_cells_with_a_gradient_even_where_they_are_zero() -> None:
    model = shifting()
    control, pert, _, _ = inputs(model.spec)
    control[..., :4] = 0
    predicted = model(control, pert).log1p_BSG
    assert torch.equal(predicted, control)
    (gradient,) = torch.autograd.grad(predicted.sum(), dict(model.named_parameters())["project_out.3.bias"])
    assert (gradient == control.shape[0] * control.shape[1]).all()


def test_a_shift_is_exactly_zero_for_the_control_condition_alone_and_never_goes_below_zero() -> None:
    model = shifting()
    with torch.no_grad():
        for value in model.project_out[-1].parameters():
            value.normal_(generator=torch.Generator().manual_seed(0))
    control, pert, _, _ = inputs(model.spec)
    pert[1] = model.control_feature
    predicted = model(control, pert).log1p_BSG
    assert torch.equal(predicted[1], control[1])
    assert not torch.equal(predicted[0], control[0])
    assert predicted.min() == 0


def test_a_shift_knows_its_control_feature_again_and_does_not_start_at_a_mean() -> None:
    model = shifting()
    assert model.state_dict()["control_feature"].tolist() == [0, 1, 0, 0]
    with pytest.raises(ValueError, match="not at a mean"):
        model.start_at_mean(torch.zeros(9))


@pytest.mark.parametrize(("source", "output"), [("hvg", "genes"), ("obsm:X_small", "genes"), ("genes", "hvg")])
def test_a_shift_needs_the_same_genes_on_both_sides(source: str, output: str) -> None:
    with pytest.raises(ConfigError, match='set both to "genes" or both to "hvg"'):
        tiny_spec(residual="shift", input=source, output=output)
