"""The specification of a State Transition network, and its presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

from pertcast.config import ModelConfig
from pertcast.errors import ConfigError


class Preset(NamedTuple):
    """The shape of a network, without what the data decide."""

    set_size: int
    hidden: int
    layers: int
    heads: int
    feedforward: int
    encoder_layers: int
    decoder_layers: int


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "tiny": Preset(32, hidden=64, layers=2, heads=4, feedforward=256, encoder_layers=2, decoder_layers=2),
        "state_sm": Preset(128, hidden=672, layers=4, heads=8, feedforward=2688, encoder_layers=4, decoder_layers=4),
        "state": Preset(512, hidden=768, layers=8, heads=12, feedforward=3072, encoder_layers=1, decoder_layers=1),
    }
)


@dataclass(frozen=True)
class StateSpec:
    """Everything that decides the shapes of a network and what it computes; JSON-able."""

    input_dim: int  # Widths of a control cell, of what the backbone's head gives, and of a perturbation feature
    output_dim: int
    pert_dim: int
    num_genes: int  # Genes predicted: equal to `output_dim` in gene space, the gene decoder's width in latent space
    # ``gene``: the head gives log1p expression, through a ReLU. ``latent``: it gives an embedding, and a gene
    # decoder turns that into log1p expression. ``embedding``: an embedding through a ReLU, and no genes
    output_space: Literal["gene", "latent", "embedding"]
    set_size: int  # The preset, as overridden. ``heads * head_dim`` may differ from `hidden`
    hidden: int
    layers: int
    heads: int
    head_dim: int
    feedforward: int
    encoder_layers: int
    decoder_layers: int
    dropout: float = 0.1  # Within the encoders' and decoders' MLPs; the backbone has none
    # Whether the encoded control cell is added to the backbone's output before the head; with `bottleneck` it
    # is the control cell itself, added after the head
    residual: bool = True
    num_batches: int = 0  # Rows of the batch and context embeddings; 0 if there is none
    num_contexts: int = 0
    # Whether the last row of the batch embedding is for unknown batches (code -1)
    unknown_batch: bool = False
    backbone: Literal["llama", "gpt2"] = "llama"  # ``llama`` (RMSNorm, SwiGLU) or ``gpt2`` (LayerNorm, GELU, biases)
    basal_layers: int = 1  # Layers of the control cells' encoder
    bottleneck: bool = False  # Whether the head's output passes through two more layers, an eighth as wide between them
    latent_relu: bool = False  # Whether a ReLU precedes the gene decoder
    # Hidden widths of a gene decoder with LayerNorms; empty for our own gene decoder
    decoder_widths: tuple[int, ...] = ()
    # Whether a learnt token precedes the cells of a set, and one after them that gives the set's
    # confidence
    batch_token: bool = False
    confidence_token: bool = False
    # Whether the head's output is added to the control cell itself, and is 0 for the control condition
    shift: bool = False
    on_base: bool = False  # Whether the effect of a baseline is added, too


def spec_for(
    config: ModelConfig,
    *,
    num_genes: int,
    input_dim: int,
    output_dim: int,
    pert_dim: int,
    num_batches: int,
    num_contexts: int,
) -> StateSpec:
    """Return the network's specification from the preset, the settings and the data."""
    preset = PRESETS[config.preset]
    shape = Preset(*((own if (own := getattr(config, name)) is not None else value) for name, value in _items(preset)))
    if shape.hidden % shape.heads:
        raise ConfigError(
            f"[model] heads: expected a divisor of hidden = {shape.hidden}, got {shape.heads}; change one of the two"
        )
    if config.residual == "shift" and config.input != config.output:
        raise ConfigError(
            f'[model] residual: "shift" adds to the control cell itself, so input and output must be the same '
            f'genes, got input = "{config.input}" and output = "{config.output}"; set both to "genes" or both to "hvg"'
        )
    return StateSpec(
        input_dim=input_dim,
        output_dim=output_dim,
        pert_dim=pert_dim,
        num_genes=num_genes,
        output_space="latent" if config.input.startswith("obsm:") else "gene",
        head_dim=shape.hidden // shape.heads,
        dropout=config.dropout,
        residual=config.residual == "state",
        shift=config.residual == "shift",
        on_base=config.base != "none",
        num_batches=num_batches + 1 if config.batch_embedding else 0,
        num_contexts=num_contexts if config.context_embedding else 0,
        unknown_batch=config.batch_embedding,
        **shape._asdict(),
    )


def set_size_of(config: ModelConfig) -> int:
    """Return the cells in a set: the preset's number, or the setting."""
    return PRESETS[config.preset].set_size if config.set_size is None else config.set_size


def _items(preset: Preset) -> list[tuple[str, int]]:
    return list(zip(Preset._fields, preset, strict=True))
