"""Counts the arithmetic of a training step, and measures how fast this machine multiplies matrices.

python -m benchmarks.flops                    the rate alone, GFLOP/s
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from pertcast.models.spec import StateSpec
from pertcast.models.state import StateTransition

__all__ = ["matmul_rate", "step_flops"]

_SHAPES = ((2048, 2048, 2048), (1024, 672, 2688), (1024, 2688, 672), (4096, 4096, 4096))
_REPEATS = 5


def step_flops(spec: StateSpec, *, num_sets: int) -> int:
    """Return the floating-point operations of the matrix products of one step on some sets.

    Each product counts two for each of its multiplications, and three times: forward, and backward to its input and to
    its weights; encoders' inputs need no gradient. The energy distance counts as it is computed here: within and
    between predicted and real cells, and its gradient. What is not a product does not count.
    """
    with torch.device("meta"):
        network = StateTransition(spec)
    size, total = spec.set_size, 0
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            rows = num_sets if name.startswith("pert_encoder") else num_sets * size
            passes = 2 if name in ("basal_encoder", "basal_encoder.0", "pert_encoder.0") else 3
            total += passes * 2 * rows * module.in_features * module.out_features
    # two products forward; backward one of them again, and four for the gradients
    attention = 7 * 2 * size * size * spec.heads * spec.head_dim * spec.layers
    energy = 5 * 2 * size * size * spec.output_dim
    return total + num_sets * (attention + energy)


def matmul_rate() -> float:
    """Return the best rate of float32 products of this machine, operations a second."""
    return max(_rate(functional.linear, *shape) for shape in _SHAPES)


def _rate(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], rows: int, width: int, columns: int) -> float:
    draws = torch.Generator().manual_seed(0)
    values, weight = torch.randn(rows, width, generator=draws), torch.randn(columns, width, generator=draws)
    seconds = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        product(values, weight)
        seconds.append(time.perf_counter() - start)
    return 2 * rows * width * columns / min(seconds[1:])


if __name__ == "__main__":
    print(f"{matmul_rate() / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads")
