from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pertcast.models.losses import de_loss, energy_distance, order_loss, pseudobulk_mae, ranking_loss


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
    # real cells a hundred spreads away from the predicted ones lose digits of the distances among themselves
    tolerance = 1e-4 if shift == 100 else 2e-5
    torch.testing.assert_close(energy_distance(pred, real), torch.tensor(expected), atol=2e-5, rtol=tolerance)


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


@pytest.mark.parametrize("shift", [0.0, 2.0])
@pytest.mark.parametrize(("num_cells", "num_real"), [(1, 1), (16, 16), (7, 12)])
def test_value_and_gradient_are_those_of_all_differences(num_cells: int, num_real: int, shift: float) -> None:
    pred, real = sets((3, num_cells, 50), 0, shift=shift).requires_grad_(), sets((3, num_real, 50), 1)
    weight = torch.tensor([1.0, -2.0, 0.5])
    found = energy_distance(pred, real)
    (gradient,) = torch.autograd.grad(found @ weight, pred)
    x, y = pred.double(), real.double()
    between, within_x, within_y = (
        (a[:, :, None] - b[:, None]).square().sum(-1).clamp_min(1e-8).sqrt().mean((1, 2))
        for a, b in ((x, y), (x, x), (y, y))
    )
    expected = between - (within_x + within_y) / 2
    (expected_gradient,) = torch.autograd.grad(expected @ weight.double(), pred)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-5)


def test_it_needs_no_gradient_and_gives_none_to_real_cells() -> None:
    pred, real = sets((2, 4, 5), 0), sets((2, 4, 5), 1).requires_grad_()
    assert not energy_distance(pred, real).requires_grad


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


def test_pseudobulk_mae_is_the_loop_over_genes() -> None:
    pred, real = sets((3, 4, 5), 0), sets((3, 6, 5), 1)
    expected = [
        sum(abs(float(pred[b, :, g].mean()) - float(real[b, :, g].mean())) for g in range(5)) / 5 for b in range(3)
    ]
    torch.testing.assert_close(pseudobulk_mae(pred, real), torch.tensor(expected))


def test_pseudobulk_mae_of_equal_means_is_zero_with_a_finite_gradient() -> None:
    pred = sets((1, 4, 5), 0).requires_grad_()
    loss = pseudobulk_mae(pred, pred.detach()).sum()
    (gradient,) = torch.autograd.grad(loss, pred)
    assert loss.item() == 0
    assert torch.equal(gradient, torch.zeros_like(pred))


def slow_de(logit: float, label: bool, weight: float, gamma: float) -> float:
    yes = 1 / (1 + math.exp(-logit))
    right = yes if label else 1 - yes
    focus: float = (1 - right) ** gamma
    return -(weight if label else 1.0) * focus * math.log(right)


@pytest.mark.parametrize(("weight", "gamma"), [(1.0, 0.0), (7.0, 0.0), (1.0, 2.0), (3.0, 0.5)])
def test_the_de_loss_is_the_loop_over_genes(weight: float, gamma: float) -> None:
    logits = (sets((3, 6), 0, dtype=torch.float64) - 1.5) * 2
    labels, valid = sets((3, 6), 1) > 1.5, sets((3, 6), 2) > 1.0
    valid[2] = False
    expected = []
    for b in range(3):
        genes = [g for g in range(6) if valid[b, g]]
        losses = [slow_de(float(logits[b, g]), bool(labels[b, g]), weight, gamma) for g in genes]
        expected.append(sum(losses) / max(1, len(genes)))
    found = de_loss(logits, labels, valid, positive_weight=weight, gamma=gamma)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert found[2] == 0


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_de_loss_has_a_finite_gradient_at_any_logit(gamma: float) -> None:
    logits = torch.tensor([[-1e4, -50.0, 0.0, 50.0, 1e4]]).repeat(2, 1).requires_grad_()
    labels = torch.tensor([[True] * 5, [False] * 5])
    loss = de_loss(logits, labels, torch.ones_like(labels), gamma=gamma).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert (gradient[0] <= 0).all()
    assert (gradient[1] >= 0).all()


def slow_distance(a: Tensor, b: Tensor, own: int, distance: str) -> float:
    genes = [g for g in range(len(a)) if g != own]
    x, y = [float(a[g]) for g in genes], [float(b[g]) for g in genes]
    if distance == "l1":
        return sum(abs(u - v) for u, v in zip(x, y, strict=True)) / len(genes)
    norms = [max(math.sqrt(sum(u * u for u in values)), 0.1) for values in (x, y)]
    return 1 - sum(u * v for u, v in zip(x, y, strict=True)) / (norms[0] * norms[1])


def effects(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    pred, real, others = (
        sets(shape, seed + number, dtype=torch.float64) - 1.5
        for number, shape in enumerate([(3, 5), (3, 5), (3, 4, 5)])
    )
    valid = sets((3, 4), seed + 3) > 1.0
    valid[2] = False
    return pred, real, others, {"valid_BK": valid, "own_gene_B": torch.tensor([2, -1, 0])}


@pytest.mark.parametrize("distance", ["l1", "cosine"])
def test_the_ranking_loss_is_the_loop_over_others(distance: Any) -> None:
    pred, real, others, options = effects()
    expected = []
    for b in range(3):
        own, hinges = int(options["own_gene_B"][b]), []
        for k in range(4):
            if options["valid_BK"][b, k]:
                near = slow_distance(pred[b], real[b], own, distance)
                hinges.append(max(0.0, near - slow_distance(pred[b], others[b, k], own, distance) + 0.3))
        expected.append(sum(hinges) / max(1, len(hinges)))
    found = ranking_loss(pred, real, others, distance=distance, margin=0.3, **options)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert found.max() > 0
    assert found[2] == 0


@pytest.mark.parametrize("distance", ["l1", "cosine"])
def test_the_own_gene_does_not_count(distance: Any) -> None:
    pred, real, others, options = effects()
    before = ranking_loss(pred, real, others, distance=distance, margin=0.3, **options)
    for values in (pred, real, others):
        values[0, ..., 2] += 1000.0 * torch.rand(values[0, ..., 2].shape, dtype=torch.float64)
    torch.testing.assert_close(ranking_loss(pred, real, others, distance=distance, margin=0.3, **options), before)


@pytest.mark.parametrize("distance", ["l1", "cosine"])
def test_the_ranking_loss_is_finite_at_effect_zero(distance: Any) -> None:
    _, real, others, options = effects()
    pred = torch.zeros_like(real).requires_grad_()
    loss = ranking_loss(pred, real, others, distance=distance, margin=0.5, **options).sum()
    (gradient,) = torch.autograd.grad(loss, pred)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert ranking_loss(pred, pred, 0 * others, distance=distance, margin=0.0, **options).sum() == 0


@pytest.mark.parametrize("distance", ["l1", "cosine"])
def test_the_gradients_of_the_new_losses_are_right(distance: Any) -> None:
    pred, real, others, options = effects(5)
    pred.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ranking_loss(x, real, others, distance=distance, margin=0.3, **options), (pred,)
    )
    yes = real > 0
    assert torch.autograd.gradcheck(lambda x: de_loss(x, yes, yes | True, positive_weight=3.0, gamma=2.0), (pred,))
    cells = sets((2, 3, 4), 0, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pseudobulk_mae(x, sets((2, 5, 4), 1, dtype=torch.float64)), (cells,))


def test_autocast_does_not_reach_the_new_losses() -> None:
    pred, real, others, options = effects()
    arguments = pred.float(), real.float(), others.float()
    outside = ranking_loss(*arguments, margin=0.3, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ranking_loss(*arguments, margin=0.3, **options), outside)
        assert pseudobulk_mae(pred[None].bfloat16(), real[None].float()).dtype == torch.float32


def slow_order(effect: Tensor, direction: Tensor, scale: float) -> float:
    sizes = [float(x) * int(d) if d else abs(float(x)) for x, d in zip(effect, direction, strict=True)]
    found = [size for size, d in zip(sizes, direction, strict=True) if d]
    others = [size for size, d in zip(sizes, direction, strict=True) if not d]
    missed = [math.log(1 + sum(math.exp((other - size) / scale) for other in others)) for size in found]
    return sum(missed) / len(missed) if missed else 0.0


def test_the_order_loss_is_the_loop_over_genes() -> None:
    effect = sets((4, 6), 0, dtype=torch.float64) - 1.5
    direction = torch.tensor([[1, -1, 0, 1, -1, 0], [0, 0, 0, 0, 0, 1], [0] * 6, [1, -1] * 3])
    scale = torch.tensor([0.3, 1.0, 2.0, 1.0], dtype=torch.float64)
    expected = [slow_order(*one) for one in zip(effect, direction, scale.tolist(), strict=True)]
    found = order_loss(effect, direction, scale)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    # no differential gene, and no other one
    assert found[2] == found[3] == 0
    effect.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: order_loss(x, direction, scale), (effect,))


def test_the_order_asks_for_differential_genes_above_others_and_not_for_how_many() -> None:
    direction = torch.tensor([[1, -1, 0, 0]]).repeat(4, 1)
    # above all others; one of them below another gene; on the wrong side; none predicted
    effect = torch.tensor([[2.0, -2.0, 1.0, -1.0], [2.0, -0.5, 1.0, -1.0], [-2.0, 2.0, 1.0, -1.0], [0.0] * 4])
    first, second, third, nothing = order_loss(effect, direction, torch.ones(4)).tolist()
    assert first < second < third
    assert first < nothing < third
    assert nothing == pytest.approx(math.log(3))
    # a gene that is far above the others takes nothing from the next one
    alone, beside = torch.tensor([[0.0, -1.0, 0.5, 0.5]]), torch.tensor([[9.0, -1.0, 0.5, 0.5]])
    assert order_loss(beside, direction[:1], torch.ones(1)) < order_loss(alone, direction[:1], torch.ones(1))
    # all of a perturbation's genes together are pushed about as hard where they are few as where they are many
    pushed = []
    for number in (1, 30):
        pred = torch.zeros(1, 1000, requires_grad=True)
        some = (torch.arange(1000) < number).long()[None]
        (gradient,) = torch.autograd.grad(order_loss(pred, some, torch.ones(1)).sum(), pred)
        pushed.append(float(gradient[some == 1].sum()))
    assert pushed[1] == pytest.approx(pushed[0], rel=1e-3)


def test_the_order_loss_is_finite_at_any_effect_and_not_reached_by_autocast() -> None:
    direction = torch.tensor([[1, -1, 0]])
    for size in (1e4, -1e4):
        effect = torch.tensor([[size, -size, 0.0]], requires_grad=True)
        loss = order_loss(effect, direction, torch.ones(1))
        (gradient,) = torch.autograd.grad(loss.sum(), effect)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert order_loss(torch.zeros(1, 3).bfloat16(), direction, torch.ones(1)).dtype == torch.float32


def test_the_gradient_of_the_energy_distance_is_its_slope() -> None:
    pred, real = sets((2, 4, 3), 0, dtype=torch.float64).requires_grad_(), sets((2, 5, 3), 1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda cells: energy_distance(cells, real), pred)
    real_with_gradient = real.clone().requires_grad_()
    energy_distance(pred, real_with_gradient).sum().backward()  # type: ignore[no-untyped-call]
    assert real_with_gradient.grad is None


def test_the_energy_distance_depends_on_the_sets_alone() -> None:
    pred, real = sets((3, 6, 4), 0, dtype=torch.float64), sets((3, 5, 4), 1, dtype=torch.float64)
    value = energy_distance(pred, real)
    assert value.shape == (3,)
    assert (value > 0).all()
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    torch.testing.assert_close(energy_distance(pred[:, order], real), value)
    torch.testing.assert_close(energy_distance(pred + 7, real + 7), value)
    torch.testing.assert_close(energy_distance(real, pred), value)
    torch.testing.assert_close(energy_distance(3 * pred, 3 * real), 3 * value, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(energy_distance(pred, pred), torch.zeros(3, dtype=torch.float64), atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_energy_distance_is_computed_in_float32(dtype: torch.dtype) -> None:
    pred, real = sets((2, 8, 6), 0).to(dtype), sets((2, 8, 6), 1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = energy_distance(pred, real)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, energy_distance(pred.double(), real.double()).float(), atol=1e-5, rtol=1e-5)
