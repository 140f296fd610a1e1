"""The transformer over the cells of a set. It has no mask and no positions, so cells are exchangeable.

Shapes: B sets, S cells in a set, H hidden, N heads, D width of a head, F feedforward.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

_RMS_EPSILON = 1e-6
_LAYER_NORM_EPSILON = 1e-5


class _Attention(nn.Module):
    """Multi-head attention of every cell of a set to every other."""

    def __init__(self, hidden: int, *, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden, width, bias=False)
        self.k_proj = nn.Linear(hidden, width, bias=False)
        self.v_proj = nn.Linear(hidden, width, bias=False)
        self.o_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        query_BNSD, key_BNSD, value_BNSD = (
            projection(hidden_BSH).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended_BNSD = functional.scaled_dot_product_attention(query_BNSD, key_BNSD, value_BNSD)
        return self.o_proj(attended_BNSD.transpose(1, 2).flatten(2))


class _GatedMlp(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, *, feedforward: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, feedforward, bias=False)
        self.up_proj = nn.Linear(hidden, feedforward, bias=False)
        self.down_proj = nn.Linear(feedforward, hidden, bias=False)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        gated_BSF = functional.silu(self.gate_proj(hidden_BSH)) * self.up_proj(hidden_BSH)
        return self.down_proj(gated_BSF)


class _Layer(nn.Module):
    def __init__(self, hidden: int, *, heads: int, head_dim: int, feedforward: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(hidden, eps=_RMS_EPSILON)
        self.self_attn = _Attention(hidden, heads=heads, head_dim=head_dim)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=_RMS_EPSILON)
        self.mlp = _GatedMlp(hidden, feedforward=feedforward)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        hidden_BSH = hidden_BSH + self.self_attn(self.input_layernorm(hidden_BSH))
        return hidden_BSH + self.mlp(self.post_attention_layernorm(hidden_BSH))


class Backbone(nn.Module):
    """Layers of attention and SwiGLU, each on an RMS-normalised residual stream, and a last RMSNorm."""

    def __init__(self, hidden: int, layers: int, *, heads: int, head_dim: int, feedforward: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            _Layer(hidden, heads=heads, head_dim=head_dim, feedforward=feedforward) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(hidden, eps=_RMS_EPSILON)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        # Under bf16 autocast the residual stream stays float32: sums of many layers need its digits.
        hidden_BSH = hidden_BSH.to(self.norm.weight.dtype)
        for layer in self.layers:
            hidden_BSH = layer(hidden_BSH)
        return self.norm(hidden_BSH)


class _Gpt2Attention(nn.Module):
    """Causal attention: a cell sees itself and those before it; one layer gives queries, keys and values."""

    def __init__(self, hidden: int, *, heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.c_attn = nn.Linear(hidden, 3 * heads * head_dim)
        self.c_proj = nn.Linear(heads * head_dim, hidden)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        query_BNSD, key_BNSD, value_BNSD = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.c_attn(hidden_BSH).chunk(3, dim=-1)
        )
        attended_BNSD = functional.scaled_dot_product_attention(query_BNSD, key_BNSD, value_BNSD, is_causal=True)
        return self.c_proj(attended_BNSD.transpose(1, 2).flatten(2))


class _Gpt2Mlp(nn.Module):
    """Two layers with the tanh form of GELU between them."""

    def __init__(self, hidden: int, *, feedforward: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(hidden, feedforward)
        self.c_proj = nn.Linear(feedforward, hidden)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        return self.c_proj(functional.gelu(self.c_fc(hidden_BSH), approximate="tanh"))


class _Gpt2Layer(nn.Module):
    def __init__(self, hidden: int, *, heads: int, head_dim: int, feedforward: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(hidden, eps=_LAYER_NORM_EPSILON)
        self.attn = _Gpt2Attention(hidden, heads=heads, head_dim=head_dim)
        self.ln_2 = nn.LayerNorm(hidden, eps=_LAYER_NORM_EPSILON)
        self.mlp = _Gpt2Mlp(hidden, feedforward=feedforward)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        hidden_BSH = hidden_BSH + self.attn(self.ln_1(hidden_BSH))
        return hidden_BSH + self.mlp(self.ln_2(hidden_BSH))


class Gpt2Backbone(nn.Module):
    """GPT-2's layers without positions: attention and a GELU MLP, each after a LayerNorm, and a last LayerNorm."""

    def __init__(self, hidden: int, layers: int, *, heads: int, head_dim: int, feedforward: int) -> None:
        super().__init__()
        self.h = nn.ModuleList(
            _Gpt2Layer(hidden, heads=heads, head_dim=head_dim, feedforward=feedforward) for _ in range(layers)
        )
        self.ln_f = nn.LayerNorm(hidden, eps=_LAYER_NORM_EPSILON)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        # as in Backbone: the residual stream stays float32 under autocast
        hidden_BSH = hidden_BSH.to(self.ln_f.weight.dtype)
        for layer in self.h:
            hidden_BSH = layer(hidden_BSH)
        return self.ln_f(hidden_BSH)
