"""The transformer over the cells of a set: no mask and no positions, so it treats them as exchangeable.

Shapes: B sets, S cells in a set, H hidden, N heads, D width of a head.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Backbone"]

_RMS_EPSILON = 1e-6


class _Attention(nn.Module):
    """Every cell of a set attends to every other."""

    def __init__(self, hidden: int, *, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden, width, bias=False)
        self.k_proj = nn.Linear(hidden, width, bias=False)
        self.v_proj = nn.Linear(hidden, width, bias=False)
        self.o_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        """Return the attended cells, ``(B, S, H)``."""
        query_BNSD, key_BNSD, value_BNSD = (
            projection(hidden_BSH).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended_BNSD = functional.scaled_dot_product_attention(query_BNSD, key_BNSD, value_BNSD)
        attended_BSH: Tensor = self.o_proj(attended_BNSD.transpose(1, 2).flatten(2))
        return attended_BSH


class _GatedMlp(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, *, feedforward: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, feedforward, bias=False)
        self.up_proj = nn.Linear(hidden, feedforward, bias=False)
        self.down_proj = nn.Linear(feedforward, hidden, bias=False)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        """Return ``(B, S, H)``."""
        output_BSH: Tensor = self.down_proj(functional.silu(self.gate_proj(hidden_BSH)) * self.up_proj(hidden_BSH))
        return output_BSH


class _Layer(nn.Module):
    def __init__(self, hidden: int, *, heads: int, head_dim: int, feedforward: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(hidden, eps=_RMS_EPSILON)
        self.self_attn = _Attention(hidden, heads=heads, head_dim=head_dim)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=_RMS_EPSILON)
        self.mlp = _GatedMlp(hidden, feedforward=feedforward)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        """Return ``(B, S, H)``."""
        hidden_BSH = hidden_BSH + self.self_attn(self.input_layernorm(hidden_BSH))
        output_BSH: Tensor = hidden_BSH + self.mlp(self.post_attention_layernorm(hidden_BSH))
        return output_BSH


class Backbone(nn.Module):
    """Layers of attention and SwiGLU, each on an RMS-normalised residual stream, and a last RMSNorm.

    Parameters
    ----------
    hidden, layers, heads, head_dim, feedforward
        As in :class:`pertcast.models.state.StateSpec`.
    """

    def __init__(self, hidden: int, layers: int, *, heads: int, head_dim: int, feedforward: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            _Layer(hidden, heads=heads, head_dim=head_dim, feedforward=feedforward) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(hidden, eps=_RMS_EPSILON)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        """Return ``(B, S, H)``."""
        # Under bf16 autocast the residual stream stays float32: sums of many layers need its digits.
        hidden_BSH = hidden_BSH.to(self.norm.weight.dtype)
        for layer in self.layers:
            hidden_BSH = layer(hidden_BSH)
        output_BSH: Tensor = self.norm(hidden_BSH)
        return output_BSH
