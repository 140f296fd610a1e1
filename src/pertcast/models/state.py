"""The State Transition network: a set of control cells and a perturbation in, the perturbed cells out.

Modules bear the names that arc-state's weight files use, so that weights convert both ways.
Shapes: B sets, S cells in a set, I input width, F width of a perturbation feature, H hidden, O output width, G genes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pertcast.config import ModelConfig
from pertcast.errors import ConfigError
from pertcast.models.backbone import Backbone
from pertcast.stats.draws import key_hash

__all__ = ["PRESETS", "Prediction", "Preset", "StateSpec", "StateTransition", "spec_for"]

_INIT_STD = 0.02
_GENE_DECODER_LAYERS = 3


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
    """Everything that decides the shapes of a network and what it computes; JSON-able.

    Attributes
    ----------
    input_dim, output_dim, pert_dim
        Widths of a control cell, of what the backbone's head gives, and of a perturbation feature.
    num_genes
        Genes predicted: equal to `output_dim` in gene space, the gene decoder's width in latent space.
    output_space
        ``gene``: the head gives log1p expression, through a ReLU. ``latent``: it gives an embedding, and a gene decoder
        turns that into log1p expression.
    set_size, hidden, layers, heads, head_dim, feedforward, encoder_layers, decoder_layers
        The preset, as overridden. ``heads * head_dim`` may differ from `hidden`.
    dropout
        Within the encoders' and decoders' MLPs; the backbone has none.
    residual
        Whether the encoded control cell is added to the backbone's output before the head.
    num_batches, num_contexts
        Rows of the batch and context embeddings; 0 where there is none.
    unknown_batch
        Whether the last row of the batch embedding stands for a batch that is not known (code -1).
    """

    input_dim: int
    output_dim: int
    pert_dim: int
    num_genes: int
    output_space: Literal["gene", "latent"]
    set_size: int
    hidden: int
    layers: int
    heads: int
    head_dim: int
    feedforward: int
    encoder_layers: int
    decoder_layers: int
    dropout: float = 0.1
    residual: bool = True
    num_batches: int = 0
    num_contexts: int = 0
    unknown_batch: bool = False


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
    """Return the network's specification: the preset, what the configuration overrides, and what the data decide.

    Parameters
    ----------
    config
        The ``[model]`` section.
    num_genes, input_dim, output_dim, pert_dim
        As in :class:`StateSpec`.
    num_batches, num_contexts
        Batches and contexts of the data; used where the configuration asks for their embeddings. The batch embedding
        gets one row more, for a batch that is not known.

    Raises
    ------
    ConfigError
        If the heads do not divide the hidden width.
    """
    preset = PRESETS[config.preset]
    shape = Preset(*((own if (own := getattr(config, name)) is not None else value) for name, value in _items(preset)))
    if shape.hidden % shape.heads:
        raise ConfigError(
            f"[model] heads: expected a divisor of hidden = {shape.hidden}, got {shape.heads}; change one of the two"
        )
    return StateSpec(
        input_dim=input_dim,
        output_dim=output_dim,
        pert_dim=pert_dim,
        num_genes=num_genes,
        output_space="latent" if config.input.startswith("obsm:") else "gene",
        head_dim=shape.hidden // shape.heads,
        dropout=config.dropout,
        residual=config.residual,
        num_batches=num_batches + 1 if config.batch_embedding else 0,
        num_contexts=num_contexts if config.context_embedding else 0,
        unknown_batch=config.batch_embedding,
        **dict(_items(shape)),
    )


def _items(preset: Preset) -> list[tuple[str, int]]:
    return list(zip(Preset._fields, preset, strict=True))


class Prediction(NamedTuple):
    """What the network gives: the head's output and, in latent space, the decoded genes.

    Attributes
    ----------
    latent_BSO
        The head's output: log1p expression in gene space (`genes_BSG` is ``None``), an embedding in latent space.
    genes_BSG
        Log1p expression decoded from the embedding, or ``None`` in gene space.
    """

    latent_BSO: Tensor  # noqa: N815
    genes_BSG: Tensor | None  # noqa: N815

    @property
    def log1p_BSG(self) -> Tensor:  # noqa: N802
        """Predicted log1p expression, in either space."""
        return self.latent_BSO if self.genes_BSG is None else self.genes_BSG


class StateTransition(nn.Module):
    """The State Transition network of STATE.

    ``pert_encoder(feature) + basal_encoder(cell)`` for each cell of a set, a transformer over the set without mask or
    positions (so the cells of a set are exchangeable), and a head on its output plus the encoded control cell.

    Parameters
    ----------
    spec
        Shapes and switches.
    generator
        Where initial weights are drawn from; seeded with a fixed key when not given. Within ``torch.device("meta")``
        nothing is drawn, and weights have shapes alone.

    References
    ----------
    Adduri et al., "Predicting cellular responses to perturbation across diverse contexts with STATE", 2025.

    Examples
    --------
    >>> config = ModelConfig(preset="tiny")
    >>> spec = spec_for(
    ...     config, num_genes=9, input_dim=9, output_dim=9, pert_dim=4, num_batches=0, num_contexts=1
    ... )
    >>> StateTransition(spec)(torch.zeros(2, 32, 9), torch.zeros(2, 4)).log1p_BSG.shape
    torch.Size([2, 32, 9])
    """

    def __init__(self, spec: StateSpec, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.spec = spec
        hidden, dropout = spec.hidden, spec.dropout
        # Weights take shape without values first, so that no draw comes from torch's global generator.
        with torch.device("meta"):
            self.pert_encoder = _mlp(spec.pert_dim, hidden, hidden, layers=spec.encoder_layers, dropout=dropout)
            self.basal_encoder = nn.Linear(spec.input_dim, hidden)
            self.transformer_backbone = Backbone(
                hidden, spec.layers, heads=spec.heads, head_dim=spec.head_dim, feedforward=spec.feedforward
            )
            self.project_out = _mlp(hidden, hidden, spec.output_dim, layers=spec.decoder_layers, dropout=dropout)
            self.batch_encoder = nn.Embedding(spec.num_batches, hidden) if spec.num_batches else None
            self.context_encoder = nn.Embedding(spec.num_contexts, hidden) if spec.num_contexts else None
            self.gene_decoder = (
                _mlp(spec.output_dim, hidden, spec.num_genes, layers=_GENE_DECODER_LAYERS, dropout=dropout)
                if spec.output_space == "latent"
                else None
            )
        if torch.get_default_device().type == "meta":
            return
        self.to_empty(device="cpu")
        self._draw_weights(generator or torch.Generator().manual_seed(key_hash(0, "init") % 2**63))

    @torch.no_grad()
    def _draw_weights(self, generator: torch.Generator) -> None:
        """Draw the backbone and embeddings from N(0, 0.02), as Llama does, all else as ``nn.Linear`` does."""
        for name, module in self.named_modules():
            if isinstance(module, nn.RMSNorm):
                module.weight.fill_(1)
            elif isinstance(module, nn.Embedding) or (
                isinstance(module, nn.Linear) and name.startswith("transformer_backbone.")
            ):
                module.weight.normal_(0, _INIT_STD, generator=generator)
            elif isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.uniform_(-bound, bound, generator=generator)
        if self.batch_encoder is not None and self.spec.unknown_batch:
            # Where training never meets an unknown batch, its row stays as if there were no batch embedding.
            self.batch_encoder.weight[-1].zero_()

    @torch.no_grad()
    def start_at_mean(self, mean_log1p_G: Tensor) -> None:
        """Set the bias of the last layer that gives genes to a mean expression, usually of training control cells.

        A network that starts at the mean need not spend its first thousands of steps on finding it: a cell's mean
        expression is a far larger signal than any effect, and a short training would otherwise end underway.

        Parameters
        ----------
        mean_log1p_G
            ``(num_genes,)``, mean log1p expression.
        """
        last = (self.gene_decoder if self.gene_decoder is not None else self.project_out)[-1]
        if not isinstance(last, nn.Linear) or mean_log1p_G.shape != last.bias.shape:
            raise ValueError(f"expected a mean of {self.spec.num_genes} genes, got shape {tuple(mean_log1p_G.shape)}")
        last.bias.copy_(mean_log1p_G)

    def forward(
        self,
        control_BSI: Tensor,
        pert_BF: Tensor,
        batch_BS: Tensor | None = None,
        context_B: Tensor | None = None,
    ) -> Prediction:
        """Predict perturbed cells.

        Parameters
        ----------
        control_BSI
            Control cells: log1p expression or an embedding.
        pert_BF
            One perturbation feature a set.
        batch_BS
            Batch codes of the control cells, -1 where unknown; needed with a batch embedding, ignored without.
        context_B
            Context codes of the sets; needed with a context embedding, ignored without.

        Raises
        ------
        ValueError
            If batches or contexts are needed and not given.
        """
        basal_BSH = self.basal_encoder(control_BSI)
        hidden_BSH = basal_BSH + self.pert_encoder(pert_BF)[:, None]
        if self.batch_encoder is not None:
            if batch_BS is None:
                raise ValueError("this network has a batch embedding: expected batch_BS, got None")
            if self.spec.unknown_batch:
                batch_BS = torch.where(batch_BS < 0, self.spec.num_batches - 1, batch_BS)
            hidden_BSH = hidden_BSH + self.batch_encoder(batch_BS)
        if self.context_encoder is not None:
            if context_B is None:
                raise ValueError("this network has a context embedding: expected context_B, got None")
            hidden_BSH = hidden_BSH + self.context_encoder(context_B)[:, None]
        hidden_BSH = self.transformer_backbone(hidden_BSH)
        return self._read_out(hidden_BSH + basal_BSH if self.spec.residual else hidden_BSH)

    def _read_out(self, hidden_BSH: Tensor) -> Prediction:
        output_BSO = self.project_out(hidden_BSH)
        if self.gene_decoder is None:
            return Prediction(functional.relu(output_BSO), None)
        return Prediction(output_BSO, functional.relu(self.gene_decoder(output_BSO)))


def _mlp(width_in: int, hidden: int, width_out: int, *, layers: int, dropout: float) -> nn.Sequential:
    """Return `layers` linear layers with GELU and dropout between them."""
    widths = [width_in, *[hidden] * (layers - 1), width_out]
    modules: list[nn.Module] = []
    for before, after in pairwise(widths):
        modules += [nn.Linear(before, after), nn.GELU(), nn.Dropout(dropout)]
    return nn.Sequential(*modules[:-2])
