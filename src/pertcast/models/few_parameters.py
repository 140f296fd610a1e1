"""Choose the few parameters that train in an adaptation; all others stay exactly as they are.

Shapes: C contexts, N batches, H hidden, R rank, I and O the widths of a matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pertcast.errors import ConfigError
from pertcast.models.spec import StateSpec
from pertcast.models.state import StateTransition

_CONTEXT, _BATCH = "context_encoder.weight", "batch_encoder.weight"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "c_attn", "c_proj")
_ORIGINAL = ".parametrizations.weight.original"


@dataclass(frozen=True)
class Learn:
    """The trainable parts."""

    context: bool = False  # The line's own rows of the context embedding, and its batches' rows of the batch embedding
    batch: bool = False
    bias: bool = False  # The bias of the last layer that gives genes, or all of that layer
    last: bool = False
    # One number that the last layer of a network that predicts a shift is multiplied by, and its bias, both
    # by least squares before anything else learns
    gain: bool = False
    # The same bias. It corrects the error on the line's controls, and then what all targets still get wrong in
    # common. It is fitted before anything else
    offset: bool = False
    rank: int = 0  # R of the low-rank changes of the backbone's attention matrices; 0 for none


def parse_learn(text: str) -> Learn:
    """Parse names of trainable parts, separated by commas.

    >>> parse_learn("context,lora:4")
    Learn(context=True, batch=False, bias=False, last=False, gain=False, offset=False, rank=4)
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    rank, flags, unknown = 0, {}, []
    for word in words:
        if match := re.fullmatch(r"lora:([1-9]\d*)", word):
            rank = int(match[1])
        elif word in ("context", "batch", "bias", "last", "gain", "offset"):
            flags[word] = True
        else:
            unknown.append(word)
    if unknown or not words:
        raise ConfigError(
            "[adapt] trainable: expected offset, context, batch, bias, last, gain or lora:R (R a rank, as lora:4), "
            f"separated by commas, got {', '.join(map(repr, unknown)) or 'nothing'}; correct adapt.trainable"
        )
    if "gain" in flags and "offset" in flags:
        raise ConfigError(
            "[adapt] trainable: gain and offset both find the last bias, each in its own way; take one of them out of "
            "adapt.trainable or --trainable"
        )
    return Learn(**flags, rank=rank)


def grow(
    spec: StateSpec, weights: Mapping[str, Tensor], *, new_contexts: int, new_batches: int, num_contexts: int
) -> tuple[StateSpec, dict[str, Tensor]]:
    """Return a network's specification and weights with rows for new contexts and batches; it predicts as before."""
    grown = dict(weights)
    if spec.num_contexts:
        known_CH = weights[_CONTEXT]
        grown[_CONTEXT] = torch.cat([known_CH, known_CH.mean(0, keepdim=True).expand(new_contexts, -1)])
    else:
        grown[_CONTEXT] = torch.zeros(num_contexts + new_contexts, spec.hidden)
    if spec.num_batches and spec.unknown_batch:
        known_NH = weights[_BATCH]
        grown[_BATCH] = torch.cat([known_NH[:-1], known_NH[-1:].expand(new_batches, -1), known_NH[-1:]])
        spec = replace(spec, num_batches=spec.num_batches + new_batches)
    return replace(spec, num_contexts=num_contexts + new_contexts), grown


def choose(
    network: StateTransition,
    learn: Learn,
    *,
    contexts: Sequence[int],
    batches: Sequence[int],
    generator: torch.Generator,
) -> int:
    """Make some parameters trainable and freeze all others; return how many numbers train."""
    network.requires_grad_(False)
    number = 0
    if learn.gain and not network.spec.shift:
        raise ConfigError(
            '[adapt] trainable: gain scales what a network adds to control cells (model.residual = "shift"), and '
            "this network adds nothing; remove gain from adapt.trainable"
        )
    if learn.context:
        assert network.context_encoder is not None  # grow() saw to it
        number += _learn_rows(network.context_encoder, contexts)
    if learn.batch:
        if network.batch_encoder is None:
            raise ConfigError("[adapt] trainable: the network has no batch embedding; remove batch from it")
        number += _learn_rows(network.batch_encoder, batches)
    last = last_layer(network)
    number += int(learn.gain)
    if learn.bias or learn.last:
        number += _learn_whole(last.bias)
    elif learn.gain or learn.offset:
        number += last.bias.numel()
    if learn.last:
        number += _learn_whole(last.weight)
    if learn.rank:
        for name, module in network.transformer_backbone.named_modules():
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _ATTENTION:
                change = _LowRank(module.weight, learn.rank, generator)
                parametrize.register_parametrization(module, "weight", change)
                number += change.up_OR.numel() + change.down_RI.numel()
    return number


def merge(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of an ordinary network, with low-rank changes added."""
    merged = {}
    for name, value in weights.items():
        if name.endswith(_ORIGINAL):
            prefix = name.removesuffix("original")
            merged[name.removesuffix(_ORIGINAL) + ".weight"] = (
                value + weights[f"{prefix}0.up_OR"] @ weights[f"{prefix}0.down_RI"]
            )
        elif ".parametrizations." not in name:
            merged[name] = value
    return merged


def _learn_rows(embedding: nn.Embedding, rows: Sequence[int]) -> int:
    learns_N1 = torch.zeros(embedding.num_embeddings, 1, dtype=torch.bool)
    learns_N1[list(rows)] = True
    weight = embedding.weight.requires_grad_(True)
    weight.register_hook(  # type: ignore[no-untyped-call]
        lambda gradient: torch.where(learns_N1.to(gradient.device), gradient, 0.0)
    )
    return len(rows) * embedding.embedding_dim


def _learn_whole(parameter: Tensor) -> int:
    return parameter.requires_grad_(True).numel()


def last_layer(network: StateTransition) -> nn.Linear:
    """Return the layer that predicts genes, before the last ReLU."""
    modules = network.gene_decoder or network.final_down_then_up or network.project_out
    layer = modules[-1]
    assert isinstance(layer, nn.Linear)
    return layer


class _LowRank(nn.Module):
    """A matrix plus a trainable change of rank R that starts at 0."""

    def __init__(self, weight_OI: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        width_out, width_in = weight_OI.shape
        self.down_RI = nn.Parameter(torch.empty(rank, width_in).normal_(0, width_in**-0.5, generator=generator))
        self.up_OR = nn.Parameter(torch.zeros(width_out, rank))

    def forward(self, weight_OI: Tensor) -> Tensor:
        """Return the changed matrix."""
        return weight_OI + self.up_OR @ self.down_RI
