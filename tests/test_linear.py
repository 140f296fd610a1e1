from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pertcast.models.linear import Linear, times_transposed


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(layer: nn.Module, values: Tensor, outer: Tensor) -> list[Tensor]:
    values = values.clone().requires_grad_()
    output = layer(values)
    found = torch.autograd.grad(output, [values, *layer.parameters()], outer)
    return [output.detach(), *found]


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (4, 5), (1, 1, 5), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_torchs_own_layer(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    layer, twin = Linear(5, 7, bias=bias).to(dtype), nn.Linear(5, 7, bias=bias).to(dtype)
    twin.load_state_dict(layer.state_dict())
    values, outer = drawn(*shape).to(dtype), drawn(*shape[:-1], 7, seed=1).to(dtype)
    for found, expected in zip(gradients(layer, values, outer), gradients(twin, values, outer), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected)


def test_strided_values_and_gradients_are_the_same_as_contiguous_ones() -> None:
    layer = Linear(64, 48)
    values, outer = drawn(3, 64, 20).mT, drawn(3, 48, 20, seed=1).mT
    expected = gradients(layer, values.contiguous(), outer.contiguous())
    for found, one in zip(gradients(layer, values, outer), expected, strict=True):
        torch.testing.assert_close(found, one)


def test_what_needs_no_gradient_gets_none() -> None:
    layer = Linear(5, 7).requires_grad_(requires_grad=False)
    values = drawn(3, 5).requires_grad_()
    layer(values).sum().backward()
    assert values.grad is not None
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_autocast_computes_in_bfloat16() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Linear(5, 7)(drawn(3, 5)).dtype == torch.bfloat16


def test_without_onednn_torchs_own_product_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, values = Linear(300, 200), drawn(50, 300)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert torch.equal(layer(values), nn.functional.linear(values, layer.weight, layer.bias))


@pytest.mark.parametrize("leading", [(), (2,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_with_a_transposed_matrix(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b = drawn(*leading, 6, 40).to(dtype), drawn(*leading, 40, 9, seed=1).to(dtype).mT
    torch.testing.assert_close(times_transposed(a, b), torch.einsum("...ng,...mg->...nm", a, b))
