"""Linear layers whose products run where the processor is fastest at them.

torch hands float32 products on a CPU to MKL, which does not use the AVX-512 of processors that are not Intel's; oneDNN,
which torch carries too, does (twice the rate on a Zen 5 core). Other devices, float64 and bfloat16, and a torch without
oneDNN, take torch's own way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Linear", "times_transposed"]


class Linear(nn.Linear):
    """``nn.Linear``: the same parameters and the same mathematics, with oneDNN's products on a CPU."""

    def forward(self, values: Tensor) -> Tensor:
        """Return ``values @ weight.T + bias``, ``(..., out_features)``."""
        if not _suits_onednn(values, self.weight) or torch.is_autocast_enabled(values.device.type):
            return functional.linear(values, self.weight, self.bias)
        output: Tensor = _OneDnnLinear.apply(  # type: ignore[no-untyped-call]
            values.reshape(-1, values.shape[-1]), self.weight, self.bias
        )
        return output.reshape(*values.shape[:-1], self.out_features)


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b.mT`` of ``(..., N, G)`` and ``(..., M, G)``, without a gradient; strided operands are welcome."""
    return _product(a, b) if a.dim() == 2 and _suits_onednn(a, b) else a @ b.mT


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(values_NI, weight_OI)
        return _product(values_NI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        values_NI, weight_OI = ctx.saved_tensors
        (gradient_NO,) = gradients
        needs_values, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _product(gradient_NO, weight_OI.t()) if needs_values else None,
            _product(gradient_NO.t(), values_NI.t()) if needs_weight else None,
            gradient_NO.sum(0) if needs_bias else None,
        )


def _product(a_NK: Tensor, b_MK: Tensor, bias_M: Tensor | None = None) -> Tensor:
    product_NM: Tensor = torch.ops.mkldnn._linear_pointwise(a_NK, b_MK, bias_M, "none", [], "")
    return product_NM


def _suits_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()  # a compiler has products of its own
        and a.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and a.numel() > 0
        and b.numel() > 0
        and bool(torch.backends.mkldnn.enabled)
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
