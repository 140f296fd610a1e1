from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pertcast.models.losses import energy_distance


def sets(shape: tuple[int, ...], seed: int, *, shift: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=dtype) * 3 + shift


def slow_energy(pred: Tensor, real: Tensor) -> float:
    def mean_distance(a: Tensor, b: Tensor) -> float:
        distances = [
            max(np.sqrt(sum((float(u) - float(v)) ** 2 for u, v in zip(x, y, strict=True))), 1e-4) for x in a for y in b
        ]
        return float(np.mean(distances))

    return mean_distance(pred, real) - mean_distance(pred, pred) / 2 - mean_distance(real, real) / 2


@settings(deadline=None)
@given(
    num_cells=st.integers(1, 6),
    num_real=st.integers(1, 6),
    num_genes=st.integers(1, 5),
    seed=st.integers(0, 999),
    shift=st.sampled_from([0.0, 0.5, 100.0]),
)
def test_it_is_the_double_loop(num_cells: int, num_real: int, num_genes: int, seed: int, shift: float) -> None:
    pred, real = sets((2, num_cells, num_genes), seed, shift=shift), sets((2, num_real, num_genes), seed + 1)
    expected = [slow_energy(*pair) for pair in zip(pred, real, strict=True)]
    torch.testing.assert_close(energy_distance(pred, real), torch.tensor(expected), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("num_cells", "num_genes"), [(2, 3), (8, 20), (64, 300), (128, 2000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_geomloss(num_cells: int, num_genes: int, dtype: torch.dtype) -> None:
    geomloss = pytest.importorskip("geomloss")
    pred = sets((3, num_cells, num_genes), 0, dtype=dtype)
    real = sets((3, num_cells, num_genes), 1, shift=0.1, dtype=dtype)
    # The oracle runs in float64: in float32 it computes the distance of a cell to itself as rounding noise.
    oracle = geomloss.SamplesLoss("energy", blur=0.05)(pred.double(), real.double())
    assert energy_distance(pred, real).dtype == dtype
    torch.testing.assert_close(energy_distance(pred, real).double(), oracle, atol=1e-5, rtol=1e-5)


def test_the_gradient_is_right() -> None:
    pred, real = sets((2, 4, 3), 0, dtype=torch.float64).requires_grad_(), sets((2, 5, 3), 1, dtype=torch.float64)
    assert torch.autograd.gradcheck(energy_distance, (pred, real))


def test_the_gradient_at_distance_zero_is_zero_and_finite() -> None:
    real = sets((1, 3, 4), 0)
    pred = real[:, :1].repeat(1, 3, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(energy_distance(pred, pred.detach()).sum(), pred)
    assert torch.equal(gradient, torch.zeros_like(pred))
    (gradient,) = torch.autograd.grad(energy_distance(pred, real).sum(), pred)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


def test_equal_sets_are_at_zero_and_the_order_of_cells_does_not_matter() -> None:
    cells = sets((2, 7, 9), 3, dtype=torch.float64)
    shuffled = cells[:, torch.tensor([3, 1, 0, 2, 6, 5, 4])]
    torch.testing.assert_close(energy_distance(cells, shuffled), torch.zeros(2).double(), atol=1e-5, rtol=0)


def test_autocast_does_not_reach_it() -> None:
    pred, real = sets((1, 16, 50), 0), sets((1, 16, 50), 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = energy_distance(pred, real)
    assert torch.equal(inside, energy_distance(pred, real))


def test_bfloat16_predictions_are_measured_in_float32() -> None:
    pred = sets((1, 4, 5), 0).bfloat16()
    assert energy_distance(pred, sets((1, 4, 5), 1)).dtype == torch.float32
