"""The backbone's parts in bfloat16 on a CPU, in few passes over memory.

Where a processor multiplies bfloat16 natively, products take half of float32's time, and what stands between them
counts: casts, copies, and attention kernels that are made for long sequences. Each function here is one node of
autograd, whose weights become bfloat16 beside one another, so that one product serves all of them and its sums are
float32 inside. The residual stream, weights, their gradients and normalisation stay float32.

Shapes: B sets, S cells in a set, R rows (all cells of all sets), H hidden, N heads, D width of a head, A all heads of
all sets, F width of the feedforward layer, O outputs of all weights together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["attend", "is_brief", "normalise", "swiglu"]


def is_brief(values: Tensor) -> bool:
    """Return whether these functions are for these values: on a CPU, in autocast to a bfloat16 that oneDNN knows."""
    return (
        values.device.type == "cpu"
        and not torch.compiler.is_compiling()  # a compiler fuses on its own
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and values.numel() > 0
        and bool(torch.backends.mkldnn.enabled)
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def attend(values_BSH: Tensor, weights: Sequence[Tensor], *, head_dim: int) -> Tensor:
    """Return what every cell of a set gathers from every other, heads side by side, bfloat16 ``(B, S, N * D)``.

    Parameters
    ----------
    values_BSH
        The normalised cells.
    weights
        Of queries, keys and values, ``(N * D, H)`` each.
    head_dim
        D.
    """
    with torch.autocast("cpu", enabled=False):
        attended_BSW: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
            values_BSH.bfloat16(), *weights, head_dim
        )
        return attended_BSW


def swiglu(values_BSH: Tensor, gate_FH: Tensor, up_FH: Tensor) -> Tensor:
    """Return ``silu(values @ gate.T) * (values @ up.T)``, bfloat16 ``(B, S, F)``."""
    with torch.autocast("cpu", enabled=False):
        gated_BSF: Tensor = _SwiGlu.apply(values_BSH.bfloat16(), gate_FH, up_FH)  # type: ignore[no-untyped-call]
        return gated_BSF


def normalise(values_BSH: Tensor, weight_H: Tensor, *, epsilon: float, dtype: torch.dtype) -> Tensor:
    """Return the RMS norm of values, computed in float32 and given as `dtype`."""
    with torch.autocast("cpu", enabled=False):
        normed_BSH: Tensor = _RmsNorm.apply(values_BSH.float(), weight_H.float(), epsilon, dtype)  # type: ignore[no-untyped-call]
        return normed_BSH


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_BSH: Tensor, *arguments: Any) -> Tensor:
        *weights, head_dim = arguments
        num_sets, size, _ = values_BSH.shape
        values_RH, weight_OH = values_BSH.flatten(0, 1), _beside(weights)
        query_ASD, key_ASD, value_ASD = _apart(values_RH @ weight_OH.t(), num_sets, parts=3, head_dim=head_dim)
        scores_ASS = _scaled_bmm(query_ASD, key_ASD.mT, head_dim**-0.5)
        share_ASS = scores_ASS.softmax(-1)
        ctx.save_for_backward(values_RH, weight_OH, query_ASD, key_ASD, value_ASD, share_ASS)
        ctx.widths = [len(weight) for weight in weights]
        ctx.dtypes = [weight.dtype for weight in weights]
        return _together(torch.bmm(share_ASS, value_ASD)[None], num_sets).view(num_sets, size, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        values_RH, weight_OH, query_ASD, key_ASD, value_ASD, share_ASS = ctx.saved_tensors
        num_sets, scale = len(outer[0]), query_ASD.shape[-1] ** -0.5
        (outer_ASD,) = _apart(outer[0].flatten(0, 1), num_sets, parts=1, head_dim=query_ASD.shape[-1])
        d_share_ASS = torch.bmm(outer_ASD, value_ASD.mT)
        d_scores_ASS = torch._softmax_backward_data(d_share_ASS, share_ASS, -1, share_ASS.dtype)
        d_heads_3ASD = query_ASD.new_empty((3, *query_ASD.shape))
        d_heads_3ASD[0] = _scaled_bmm(d_scores_ASS, key_ASD, scale)
        d_heads_3ASD[1] = _scaled_bmm(d_scores_ASS.mT, query_ASD, scale)
        d_heads_3ASD[2] = torch.bmm(share_ASS.mT, outer_ASD)
        d_values, *d_weights = _back(ctx, _together(d_heads_3ASD, num_sets), values_RH, weight_OH)
        return None if d_values is None else d_values.view(num_sets, -1, d_values.shape[-1]), *d_weights, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_BSH: Tensor, *weights: Tensor) -> Tensor:
        values_RH, weight_OH = values_BSH.flatten(0, 1), _beside(weights)
        both_RO = values_RH @ weight_OH.t()
        gate_RF, up_RF = both_RO.chunk(2, dim=-1)
        silu_RF = functional.silu(gate_RF)
        ctx.save_for_backward(values_RH, weight_OH, both_RO, silu_RF)
        ctx.widths = [len(weight) for weight in weights]
        ctx.dtypes = [weight.dtype for weight in weights]
        gated_RF: Tensor = silu_RF * up_RF
        return gated_RF.view(*values_BSH.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        values_RH, weight_OH, both_RO, silu_RF = ctx.saved_tensors
        outer_RF = outer[0].flatten(0, 1)
        gate_RF, up_RF = both_RO.chunk(2, dim=-1)
        d_both_RO = torch.empty_like(both_RO)
        d_gate_RF, d_up_RF = d_both_RO.chunk(2, dim=-1)
        torch.mul(silu_RF, outer_RF, out=d_up_RF)
        torch.ops.aten.silu_backward(outer_RF * up_RF, gate_RF, grad_input=d_gate_RF)
        d_values, *d_weights = _back(ctx, d_both_RO, values_RH, weight_OH)
        return None if d_values is None else d_values.view(*outer[0].shape[:2], -1), *d_weights


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_BSH: Tensor, weight_H: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        length_BS1 = torch.linalg.vector_norm(values_BSH, dim=-1, keepdim=True)
        inverse_BS1 = length_BS1.square_().div_(values_BSH.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(values_BSH, weight_H, inverse_BS1)
        normed_BSH: Tensor = (values_BSH * inverse_BS1).mul_(weight_H)
        return normed_BSH.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        values_BSH, weight_H, inverse_BS1 = ctx.saved_tensors
        outer_BSH = outer[0].to(values_BSH.dtype)
        normed_BSH = values_BSH * inverse_BS1
        product_BSH = outer_BSH * normed_BSH
        d_weight_H = product_BSH.sum((0, 1)) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, d_weight_H, None, None
        along_BS1 = (product_BSH @ weight_H)[..., None] / -len(weight_H)
        d_values_BSH = torch.mul(outer_BSH, weight_H, out=product_BSH)
        return d_values_BSH.addcmul_(normed_BSH, along_BS1).mul_(inverse_BS1), d_weight_H, None, None


def _beside(weights: Sequence[Tensor]) -> Tensor:
    """Return weights ``(_, H)`` one below the other, in bfloat16."""
    heights = [len(weight) for weight in weights]
    weight_OH = torch.empty((sum(heights), weights[0].shape[1]), dtype=torch.bfloat16)
    for part, weight in zip(torch.split(weight_OH, heights), weights, strict=True):
        part.copy_(weight.detach())
    return weight_OH


def _back(ctx: Any, d_output_RO: Tensor, values_RH: Tensor, weight_OH: Tensor) -> list[Tensor | None]:
    """Return the gradients of the values and of each weight that an output's gradient gives."""
    needs_values, *needs = ctx.needs_input_grad[: 1 + len(ctx.widths)]
    d_values_RH = d_output_RO @ weight_OH if needs_values else None
    if not any(needs):
        return [d_values_RH, *[None] * len(needs)]
    parts = torch.split(d_output_RO.t() @ values_RH, ctx.widths)
    wanted = zip(parts, ctx.dtypes, needs, strict=True)
    return [d_values_RH, *[part.to(dtype) if need else None for part, dtype, need in wanted]]


def _apart(rows_RO: Tensor, num_sets: int, *, parts: int, head_dim: int) -> Tensor:
    """Return rows of heads that lie side by side as heads that lie one after the other, ``(parts, A, S, D)``."""
    size, num_heads = len(rows_RO) // num_sets, rows_RO.shape[1] // (parts * head_dim)
    heads_BSPND = rows_RO.reshape(num_sets, size, parts, num_heads, head_dim)
    return heads_BSPND.permute(2, 0, 3, 1, 4).reshape(parts, num_sets * num_heads, size, head_dim)


def _together(heads_PASD: Tensor, num_sets: int) -> Tensor:
    """Undo :func:`_apart`."""
    parts, num_heads, size, head_dim = heads_PASD.shape
    heads_PBNSD = heads_PASD.view(parts, num_sets, num_heads // num_sets, size, head_dim)
    return heads_PBNSD.permute(1, 3, 0, 2, 4).reshape(num_sets * size, -1)


def _scaled_bmm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)
