"""The State Transition network: a set of control cells and a perturbation → the perturbed cells.

Modules have the names of arc-state's weight files, so weights convert both ways. Shapes: B sets, S cells in a set, I
input width, F width of a perturbation feature, H hidden, O output width, G genes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pertcast.models.heads import ConfidenceToken, CountsHead, CountsPrediction, DeHead, bottleneck, mlp, normed_mlp
from pertcast.models.spec import StateSpec
from pertcast.models.transformer import Backbone, Gpt2Backbone
from pertcast.stats.draws import key_hash

_INIT_STD = 0.02
_GENE_DECODER_LAYERS = 3


class Prediction(NamedTuple):
    """The network's output: the head's and, in latent space, the decoded genes."""

    # The head's output: log1p expression in gene space (`genes_BSG` is ``None``), an embedding in latent
    # space
    latent_BSO: Tensor
    genes_BSG: Tensor | None  # Log1p expression decoded from the embedding, or ``None`` in gene space
    confidence_B: Tensor | None = None  # The confidence of each set, from networks with a confidence token
    de_BG: Tensor | None = None  # Logits of the DE head, in training with one
    counts: CountsPrediction | None = None  # The output of the counts head, if there is one
    # The part of the baseline's effect that is lost when cells are clipped at 0, 0 or
    # less
    clipped_effect_BG: Tensor | None = None

    @property
    def log1p_BSG(self) -> Tensor:
        """Predicted log1p expression, in either space."""
        return self.latent_BSO if self.genes_BSG is None else self.genes_BSG

    @property
    def unclipped_BSG(self) -> Tensor:
        """The same with all of the baseline's effect in the mean over cells; values may be below 0."""
        return self.log1p_BSG if self.clipped_effect_BG is None else self.log1p_BSG + self.clipped_effect_BG[:, None]


class StateTransition(nn.Module):
    """The State Transition network of STATE.

    >>> from pertcast.config import ModelConfig
    >>> from pertcast.models.spec import spec_for
    >>> config = ModelConfig(preset="tiny")
    >>> spec = spec_for(
    ...     config, num_genes=9, input_dim=9, output_dim=9, pert_dim=4, num_batches=0, num_contexts=1
    ... )
    >>> StateTransition(spec)(torch.zeros(2, 32, 9), torch.zeros(2, 4)).log1p_BSG.shape
    torch.Size([2, 32, 9])
    """

    control_feature: Tensor

    def __init__(self, spec: StateSpec, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.spec = spec
        hidden, dropout = spec.hidden, spec.dropout
        # Weights take shape without values first, so that no draw comes from torch's global generator.
        with torch.device("meta"):
            self.pert_encoder = mlp(spec.pert_dim, hidden, hidden, layers=spec.encoder_layers, dropout=dropout)
            self.basal_encoder = (
                nn.Linear(spec.input_dim, hidden)
                if spec.basal_layers == 1
                else mlp(spec.input_dim, hidden, hidden, layers=spec.basal_layers, dropout=dropout)
            )
            backbone = Gpt2Backbone if spec.backbone == "gpt2" else Backbone
            self.transformer_backbone = backbone(
                hidden, spec.layers, heads=spec.heads, head_dim=spec.head_dim, feedforward=spec.feedforward
            )
            self.project_out = mlp(hidden, hidden, spec.output_dim, layers=spec.decoder_layers, dropout=dropout)
            self.final_down_then_up = bottleneck(spec.output_dim) if spec.bottleneck else None
            self.batch_encoder = nn.Embedding(spec.num_batches, hidden) if spec.num_batches else None
            self.context_encoder = nn.Embedding(spec.num_contexts, hidden) if spec.num_contexts else None
            self.batch_token = nn.Parameter(torch.empty(1, 1, hidden)) if spec.batch_token else None
            self.confidence_token = ConfidenceToken(hidden, dropout=dropout) if spec.confidence_token else None
            self.gene_decoder = _gene_decoder(spec) if spec.output_space == "latent" else None
            if spec.shift:
                self.register_buffer("control_feature", torch.empty(spec.pert_dim))
        self.de_head: DeHead | None = None
        self.counts_head: CountsHead | None = None
        if torch.get_default_device().type == "meta":
            return
        self.to_empty(device="cpu")
        self._draw_weights(generator or torch.Generator().manual_seed(key_hash(0, "init") % 2**63))

    @torch.no_grad()
    def _draw_weights(self, generator: torch.Generator) -> None:
        """Draw the backbone, embeddings and tokens from N(0, 0.02), as Llama does, the rest as ``nn.Linear`` does."""
        for name, module in self.named_modules():
            if isinstance(module, nn.RMSNorm | nn.LayerNorm):
                module.weight.fill_(1)
                if isinstance(module, nn.LayerNorm):
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding) or (
                isinstance(module, nn.Linear) and name.startswith("transformer_backbone.")
            ):
                module.weight.normal_(0, _INIT_STD, generator=generator)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.uniform_(-bound, bound, generator=generator)
        for token in (self.batch_token, getattr(self.confidence_token, "confidence_token", None)):
            if token is not None:
                token.normal_(0, _INIT_STD, generator=generator)
        if self.batch_encoder is not None and self.spec.unknown_batch:
            # Where training never meets an unknown batch, its row stays as if there were no batch embedding.
            self.batch_encoder.weight[-1].zero_()
        if self.spec.shift:
            # Training starts at the control cells themselves.
            for value in (*self.project_out[-1].parameters(), self.control_feature):
                value.zero_()

    def add_de_head(self) -> None:
        """Add the DE head, which only training uses."""
        self.de_head = DeHead(self.spec.hidden, self.spec.num_genes)
        self.de_head.start()

    def add_counts_head(self, log_shape_G: Tensor | None = None) -> None:
        """Add the counts head with these dispersions; without them, its weights are loaded later."""
        self.counts_head = CountsHead(self.spec.hidden, self.spec.num_genes)
        if log_shape_G is not None:
            self.counts_head.start(log_shape_G)

    @torch.no_grad()
    def set_control_feature(self, feature_F: Tensor) -> None:
        """Set the feature of the control condition, for which a shift is exactly 0."""
        if self.spec.shift:
            self.control_feature.copy_(feature_F)

    @torch.no_grad()
    def start_at_mean(self, mean_log1p_G: Tensor) -> None:
        """Set the last bias to a mean expression, usually of training control cells."""
        if self.spec.shift:
            raise ValueError("a network that predicts a shift starts at the control cells, not at a mean")
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
        base_BG: Tensor | None = None,
        control_mean_BG: Tensor | None = None,
    ) -> Prediction:
        """Predict perturbed cells."""
        basal_BSH = self.basal_encoder(control_BSI)
        hidden_BSH, confidence_B = self.attend(basal_BSH, pert_BF, batch_BS, context_B)
        if self.spec.residual and self.final_down_then_up is None:
            hidden_BSH = hidden_BSH + basal_BSH
        output_BSO = self.project_out(hidden_BSH)
        if self.final_down_then_up is not None:
            output_BSO = self.final_down_then_up(output_BSO + control_BSI if self.spec.residual else output_BSO)
        prediction = self.finish(output_BSO, hidden_BSH, confidence_B, pert_BF, control_BSI, base_BG)
        if self.de_head is None or control_mean_BG is None:
            return prediction
        effect_BG = prediction.log1p_BSG.mean(1) - control_mean_BG
        return prediction._replace(de_BG=self.de_head(hidden_BSH.mean(1), effect_BG))

    def finish(
        self,
        output_BSO: Tensor,
        hidden_BSH: Tensor,
        confidence_B: Tensor | None,
        pert_BF: Tensor,
        control_BSI: Tensor | None,
        base_BG: Tensor | None,
    ) -> Prediction:
        """Return the prediction from what the head gives; only a shift needs the control cells."""
        clipped_effect_BG = None
        if self.spec.shift:
            assert control_BSI is not None
            is_perturbed_B11 = (pert_BF != self.control_feature).any(-1)[:, None, None]
            # Unlike relu, clamp_min lets the gradient through at 0, where most values of control cells are.
            output_BSO = (control_BSI + self._with_base(output_BSO, base_BG) * is_perturbed_B11).clamp_min(0)
            if base_BG is not None and self.spec.on_base:
                clipped_effect_BG = clipped_effect(control_BSI, base_BG * is_perturbed_B11[:, 0])
        if self.gene_decoder is None:
            cells_BSO = functional.relu(output_BSO) if not self.spec.shift else output_BSO
            prediction = Prediction(cells_BSO, None, confidence_B, clipped_effect_BG=clipped_effect_BG)
        else:
            if self.spec.latent_relu:
                output_BSO = functional.relu(output_BSO)
            prediction = Prediction(output_BSO, functional.relu(self.gene_decoder(output_BSO)), confidence_B)
        if self.counts_head is not None:
            prediction = prediction._replace(counts=self.counts_head(hidden_BSH.mean(1)))
        return prediction

    def attend(
        self, basal_BSH: Tensor, pert_BF: Tensor, batch_BS: Tensor | None, context_B: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the backbone's output for encoded control cells, ``(B, S, H)``, and the sets' confidence."""
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
        return self._attend(hidden_BSH)

    def _with_base(self, shift_BSO: Tensor, base_BG: Tensor | None) -> Tensor:
        if not self.spec.on_base:
            return shift_BSO
        if base_BG is None:
            raise ValueError("this network has a baseline: expected base_BG, got None")
        return shift_BSO + base_BG[:, None]

    def _attend(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the backbone on cells and tokens; return the cells, and the sets' confidence."""
        num_before, size = 0, hidden_BSH.shape[1]
        if self.batch_token is not None:
            num_before = 1
            hidden_BSH = torch.cat([self.batch_token.expand(len(hidden_BSH), -1, -1), hidden_BSH], dim=1)
        if self.confidence_token is not None:
            token_BSH = self.confidence_token.confidence_token.expand(len(hidden_BSH), -1, -1)
            hidden_BSH = torch.cat([hidden_BSH, token_BSH], dim=1)
        hidden_BSH = self.transformer_backbone(hidden_BSH)
        confidence_B = None if self.confidence_token is None else self.confidence_token(hidden_BSH[:, -1:])
        return hidden_BSH[:, num_before : num_before + size], confidence_B


def clipped_effect(control_BSG: Tensor, effect_BG: Tensor) -> Tensor:
    """Return the part of an effect that sets of control cells lose when they are clipped at 0, (B, G).

    >>> clipped_effect(torch.tensor([[[0.0], [2.0]]]), torch.tensor([[-1.0]]))
    tensor([[-0.5000]])
    """
    return effect_BG - ((control_BSG + effect_BG[:, None]).clamp_min(0) - control_BSG).mean(1)


def _gene_decoder(spec: StateSpec) -> nn.Sequential:
    """Return the decoder from an embedding to log1p expression, without the last ReLU."""
    if spec.decoder_widths:
        return normed_mlp((spec.output_dim, *spec.decoder_widths, spec.num_genes), dropout=spec.dropout)
    return mlp(spec.output_dim, spec.hidden, spec.num_genes, layers=_GENE_DECODER_LAYERS, dropout=spec.dropout)
