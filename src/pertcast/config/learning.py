"""What decides how a network learns: its shape, its loss, its training, and its adaptation to a new cell line."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from pertcast.config.base import Section, Share, Weight

__all__ = ["RESIDUAL_OF_SWITCH", "AdaptConfig", "LossConfig", "ModelConfig", "TrainConfig"]

# What `model.residual` was called when it was a switch.
RESIDUAL_OF_SWITCH = {True: "state", False: "none"}


class ModelConfig(Section):
    """What learns. `kind` is ``state``, the State Transition network, or a baseline.

    Baselines are fitted on the effects of training perturbations: ``control`` (no effect), ``mean`` (the mean effect),
    and on the perturbation features ``ridge``, ``kernel_ridge`` and ``knn`` (nearest neighbours). Of the other keys
    they heed `output`, and `set_size` with its `preset`.

    `base` is the baseline that a network with ``residual = "shift"`` adds its shift to, or ``none``.

    A network is a preset, and what differs from it.
    `input` is what control cells are read as: ``genes``, ``hvg``, or ``obsm:NAME`` (an embedding, with a decoder to
    genes). `output` is ``genes`` (all of the gene list) or ``hvg``.

    `residual` says what the network's output is added to: ``state``, the encoded control cell, as in STATE; ``shift``,
    the control cell itself, so that the control condition comes out unchanged (input and output must be the same
    genes); or ``none``.
    """

    kind: Literal["state", "control", "mean", "ridge", "kernel_ridge", "knn"] = "state"
    base: Literal["none", "mean", "ridge", "kernel_ridge", "knn"] = "none"
    preset: Literal["tiny", "state_sm", "state"] = "state_sm"
    input: str = "genes"
    output: Literal["genes", "hvg"] = "genes"
    set_size: PositiveInt | None = None
    hidden: PositiveInt | None = None
    layers: PositiveInt | None = None
    heads: PositiveInt | None = None
    feedforward: PositiveInt | None = None
    encoder_layers: PositiveInt | None = None
    decoder_layers: PositiveInt | None = None
    dropout: Share = 0.1
    residual: Literal["state", "shift", "none"] = "state"
    batch_embedding: bool = False
    context_embedding: bool = False

    @field_validator("residual", mode="before")
    @classmethod
    def _no_switch(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError(  # noqa: TRY004 (pydantic takes no TypeError)
                f'expected "state", "shift" or "none"; what was {str(value).lower()} is "{RESIDUAL_OF_SWITCH[value]}"'
            )
        return value

    @field_validator("input")
    @classmethod
    def _known_input(cls, value: str) -> str:
        if value not in ("genes", "hvg") and not re.fullmatch(r"obsm:.+", value):
            raise ValueError("expected 'genes', 'hvg' or 'obsm:NAME'")
        return value

    @model_validator(mode="after")
    def _base_goes_with_shift(self) -> ModelConfig:
        if self.base != "none" and (self.kind, self.residual) != ("state", "shift"):
            raise ValueError(
                f'`base = "{self.base}"` is what a network adds its shift to: '
                'it goes with `kind = "state"` and `residual = "shift"`'
            )
        return self


class LossConfig(Section):
    """Weights of the terms of the loss; 0 switches a term off. `decoder` applies where the input is an embedding.

    `mae` is of the pseudobulk, `de` of a head that says which genes are differentially expressed, `rank` of how much
    nearer a predicted effect is to its own real one than to others', `nb` of the counts head, which gives the network's
    hidden state a negative binomial likelihood of the real counts; their weights rise linearly over `warmup_steps`.

    `mae_of` says what the predicted pseudobulk is compared with: the mean ``effect`` of all training cells of the
    perturbation, or the mean of the ``set`` of real cells alone, whose sampling noise is larger than most effects.
    `de_head` asks that a perturbation's differentially expressed genes come first in the ``order`` of its predicted
    effects; or of each gene by itself whether it is one: a soft version of the official ``test`` on the predicted
    effect, without parameters of its own; or ``learned``, a logit from the set's pooled state and the size of the
    effect. These two learn by cross-entropy, ``bce`` with a weight for differentially expressed genes ("balanced": as
    many times as they are rarer), or ``focal`` with `de_gamma`. Ranking measures ``cosine`` or ``l1`` (whose margins
    are about a hundredth) and compares with the other sets of the batch and with `rank_negatives` effects of other
    training perturbations.
    """

    energy: Weight = 1.0
    decoder: Weight = 1.0
    mae: Weight = 0.0
    de: Weight = 0.0
    rank: Weight = 0.0
    nb: Weight = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    mae_of: Literal["effect", "set"] = "effect"
    de_head: Literal["order", "test", "learned"] = "order"
    de_form: Literal["bce", "focal"] = "bce"
    de_positive_weight: PositiveFloat | Literal["balanced"] = "balanced"
    de_gamma: Weight = 2.0
    rank_distance: Literal["cosine", "l1"] = "cosine"
    rank_margin: Weight = 0.2
    rank_negatives: Annotated[int, Field(ge=0)] = 16

    @model_validator(mode="after")
    def _each_gene_by_itself(self) -> LossConfig:
        if self.de and self.de_head == "order" and (self.de_form, self.de_positive_weight) != ("bce", "balanced"):
            raise ValueError(
                "`de_form` and `de_positive_weight` are of single genes, of which the order of all of a perturbation's "
                'asks nothing; leave them away, or set `de_head = "test"` or "learned"'
            )
        return self


class TrainConfig(Section):
    """The training loop: a step is `sets_per_step` sets times `accumulate`; `patience` counts validations, 0 = no end.

    The learning rate rises over `warmup_steps`, and falls linearly to a hundredth of its height over `decay_steps`,
    counted from the first step; 0 = level. It does not hang on `steps`, so that a run can be made longer.

    `match` says which controls a perturbed cell is paired with: those of its own ``batch``, or any of its ``context``;
    in either case of its own file, or, where that has none, of its own dataset. ``all_datasets`` is as ``batch``, and a
    cell whose dataset has no control of its context is paired with one of another dataset.

    The sets of a step are shared out over `devices` on each of `num_nodes` machines. `strategy` is how: each device has
    the whole network (``ddp``; ``auto`` with several devices), or a part of each of its parameters (``fsdp``). Where
    the model embeds batches, a share `unknown_batch` of the sets is shown as of no known batch, so that cells of new
    batches have a trained row.

    `precision` is of the network's products: ``fp32``, ``tf32`` or ``bf16``; ``auto`` is bf16 where the processor or
    GPU multiplies it natively, else fp32. Weights, optimiser and losses are float32 in each.

    `feature_noise` is added to the perturbation feature that each set is shown with, normal draws of so many times the
    features' root mean square: it keeps a network from learning a few hundred perturbations by heart, as a penalty does
    ridge regression. Prediction adds none.

    `select_by` says which validated step is best, whose weights are kept: that of the lowest ``loss``, or of the best
    ``mae``, ``pds``, ``des`` or ``overall`` (against the training-mean baseline) of the perturbations that validate.
    """

    seed: int = 0
    steps: PositiveInt = 40_000
    sets_per_step: PositiveInt = 8
    accumulate: PositiveInt = 1
    optimizer: Literal["adamw", "adam"] = "adamw"
    learning_rate: PositiveFloat = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_steps: Annotated[int, Field(ge=0)] = 0
    clip: Annotated[float, Field(ge=0)] = 10.0
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    compile: bool = False
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    devices: PositiveInt = 1
    num_nodes: PositiveInt = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    match: Literal["batch", "context", "all_datasets"] = "batch"
    unknown_batch: Share = 0.1
    feature_noise: Annotated[float, Field(ge=0)] = 0.0
    control_sets: bool = True
    val_every: PositiveInt = 2000
    select_by: Literal["loss", "overall", "mae", "pds", "des"] = "loss"
    max_val_sets: PositiveInt = 256
    checkpoint_every: PositiveInt = 2000
    patience: Annotated[int, Field(ge=0)] = 0
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()


class AdaptConfig(Section):
    """Adaptation to a new cell line: which few parameters learn, how fast, and when they stop.

    `learn` names them, with commas: ``offset`` (the bias of the last layer, in closed form, without steps), ``context``
    (the line's own row of the context embedding), ``batch`` (rows of its new batches), ``bias`` (of the last layer, by
    steps), ``last`` (all of the last layer), ``gain`` (a factor and the bias of what is added to control cells, without
    steps), ``lora:R`` (low-rank changes of rank R of the backbone's matrices).
    What takes steps stops after `steps`, or when `patience` validations in turn, one every `val_every` steps, have not
    improved; 0 = no end. All else of the training is as in ``[train]``.
    """

    learn: str = "offset"
    steps: PositiveInt = 600
    learning_rate: PositiveFloat = 3e-3
    val_every: PositiveInt = 20
    patience: Annotated[int, Field(ge=0)] = 10
