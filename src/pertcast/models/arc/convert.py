"""Turns what an arc-state folder holds into our network: its specification, its weights by our names, its names.

Invariants: the network computes what arc-state's computes of the same input; LoRA is merged; weights that arc-state's
forward pass does not read are left out, and a note says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pertcast.errors import CheckpointError, Problem
from pertcast.models.arc.folder import ArcFolder
from pertcast.models.arc.options import GENE_KEYS, backbone_shape, option_problems
from pertcast.models.checkpoint import require_shapes
from pertcast.models.spec import StateSpec
from pertcast.models.state import StateTransition

__all__ = ["TRANSPOSED", "ArcNames", "ArcNetwork", "convert_run"]

_LORA = re.compile(r"(.+)\.lora_([AB])\.[^.]+\.weight")
TRANSPOSED = re.compile(r"transformer_backbone\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
# vocabularies, which cells do not have; a buffer of masks; positions, which arc-state sets to zero
_IDLE = re.compile(r"transformer_backbone\.(embed_tokens\.weight|wte\.weight|wpe\.weight|h\.\d+\.attn\.(masked_)?bias)")
_POSITIONS = "transformer_backbone.wpe.weight"


@dataclass(frozen=True)
class ArcNames:
    """Which genes a network reads and gives, in its order.

    Attributes
    ----------
    inputs
        Genes that it reads; empty where it reads an embedding.
    outputs
        Genes that it predicts; empty where it gives an embedding.
    embedding
        The ``obsm`` key that it reads, or ``None``.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    embedding: str | None


@dataclass(frozen=True)
class ArcNetwork:
    """A converted network.

    Attributes
    ----------
    spec, weights
        Our network.
    notes
        What was left out.
    """

    spec: StateSpec
    weights: dict[str, Tensor]
    notes: tuple[str, ...]

    def model(self) -> StateTransition:
        """Return the network with its weights, in evaluation mode."""
        with torch.device("meta"):
            model = StateTransition(self.spec)
        model.load_state_dict(self.weights, assign=True)
        return model.eval()


def convert_run(folder: ArcFolder) -> ArcNetwork:
    """Return the folder's network as ours.

    Raises
    ------
    CheckpointError
        Naming every option that is not covered, or every tensor that does not fit the options.
    """
    problems = option_problems(folder.options, is_early=folder.is_early)
    if problems:
        raise CheckpointError(
            f"{folder.path}: {len(problems)} option(s) that pertcast does not cover", problems=problems
        )
    weights, notes = _tensors(folder)
    try:
        spec, left_out = _spec(folder, weights)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder.path}: its options are not whole ({type(error).__name__}: {error}); "
            "mend config.yaml, or give another folder"
        ) from None
    if left_out:
        weights = {name: value for name, value in weights.items() if not name.startswith(left_out)}
        notes.append(f"weights that its output does not depend on were left out: {', '.join(left_out)}")
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in StateTransition(spec).state_dict().items()}
    require_shapes(folder.checkpoint, {name: tuple(value.shape) for name, value in weights.items()}, expected)
    return ArcNetwork(spec, weights, tuple(notes))


def _spec(folder: ArcFolder, weights: dict[str, Tensor]) -> tuple[StateSpec, tuple[str, ...]]:
    """Return the specification, and the beginnings of the names of weights that nothing depends on."""
    options = folder.options
    hidden, set_size = int(options["hidden_dim"]), int(options.get("cell_set_len", 256))
    shape = backbone_shape(options, hidden=hidden)
    output_dim = int(options["output_dim"])
    embed_key, arc_space = options.get("embed_key"), str(options.get("output_space", "gene"))
    is_gene_input = embed_key in GENE_KEYS
    decodes = not is_gene_input if arc_space == "gene" else arc_space == "all" and embed_key is not None
    has_decoder = any(name.startswith("gene_decoder.") for name in weights)
    left_out = ["batch_classifier."]
    space: Literal["gene", "latent", "embedding"] = "gene" if is_gene_input else "embedding"
    widths: tuple[int, ...] = ()
    num_genes = output_dim if is_gene_input else 0
    if has_decoder and decodes:
        space = "latent"
        sizes = [
            len(weights[name]) for name in _by_place(weights, r"gene_decoder\.(\d+)\.weight") if weights[name].ndim == 2
        ]
        widths, num_genes = tuple(sizes[:-1]), sizes[-1]
    elif has_decoder and not is_gene_input:
        # only of before 0.9.8: with a decoder that it does not use, it does not cut embeddings off at 0
        raise CheckpointError(
            f"{folder.path}: output_space {arc_space!r} with a gene decoder is not covered; train with output_space "
            '"gene" or "all"'
        )
    elif has_decoder:
        left_out.append("gene_decoder.")
    residual = bool(options.get("predict_residual", True))
    # before 0.9.8 there was none
    has_bottleneck = (
        arc_space == "all" and residual and (not folder.is_early or "final_down_then_up.0.weight" in weights)
    )
    if not has_bottleneck:
        left_out.append("final_down_then_up.")
    encoder_layers = int(options.get("n_encoder_layers", 2))
    spec = StateSpec(
        input_dim=int(options["input_dim"]),
        output_dim=output_dim,
        pert_dim=int(options["pert_dim"]),
        num_genes=num_genes,
        output_space=space,
        set_size=set_size,
        hidden=hidden,
        layers=shape.layers,
        heads=shape.heads,
        head_dim=shape.head_dim,
        feedforward=shape.feedforward,
        encoder_layers=encoder_layers,
        decoder_layers=int(options.get("n_decoder_layers", 2)),
        dropout=float(options.get("dropout", 0.1)),
        residual=residual,
        num_batches=len(weights["batch_encoder.weight"])
        if options.get("batch_encoder") and "batch_encoder.weight" in weights
        else 0,
        backbone=shape.kind,
        basal_layers=encoder_layers if options.get("use_basal_projection", True) else 1,
        bottleneck=has_bottleneck,
        latent_relu=space == "latent" and is_gene_input,
        decoder_widths=widths,
        batch_token="batch_token" in weights,
        confidence_token=bool(options.get("confidence_token")),
    )
    return spec, tuple(start for start in left_out if any(name.startswith(start) for name in weights))


def _by_place(weights: dict[str, Tensor], pattern: str) -> list[str]:
    found = {name: match for name in weights if (match := re.fullmatch(pattern, name))}
    return sorted(found, key=lambda name: int(found[name][1]))


def _tensors(folder: ArcFolder) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights under our names, LoRA merged, float32."""
    notes = []
    weights = {name: value.float() for name, value in folder.weights.items()}
    if _POSITIONS in _plain(weights) and _plain(weights)[_POSITIONS].any():
        raise CheckpointError(
            f"{folder.checkpoint}: {_POSITIONS} is not zero; cells with positions are not covered",
            problems=[Problem("model.kwargs.transformer_backbone_key", "GPT2 with position embeddings is not covered")],
        )
    if any(_LORA.fullmatch(name) for name in weights):
        weights = _merge_lora(folder, weights)
        notes.append("its LoRA weights were merged into the backbone")
    weights = {name: value for name, value in _plain(weights).items() if not _IDLE.fullmatch(name)}
    renamed = {}
    for name, value in weights.items():
        name = name.replace("gene_decoder.decoder.", "gene_decoder.")
        if "basal_encoder.3.weight" not in weights:
            name = name.replace("basal_encoder.0.", "basal_encoder.")
        renamed[name] = value.T.contiguous() if TRANSPOSED.fullmatch(name) else value
    return renamed, notes


def _plain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights without the wrappers that LoRA puts around names."""
    return {name.replace(".base_model.model.", ".").replace(".base_layer.", "."): weights[name] for name in weights}


def _merge_lora(folder: ArcFolder, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    options: dict[str, Any] = folder.options.get("lora") or {}
    merged = {name: value for name, value in weights.items() if not _LORA.fullmatch(name)}
    for name, lower in weights.items():
        match = _LORA.fullmatch(name)
        if match is None or match[2] != "A":
            continue
        base = f"{match[1]}.base_layer.weight"
        upper = weights.get(name.replace(".lora_A.", ".lora_B."))
        if base not in merged or upper is None:
            raise CheckpointError(f"{folder.checkpoint}: {name} has no weights to be merged into")
        update = (upper.double() @ lower.double()) * (float(options.get("alpha", 32)) / float(options.get("r", 16)))
        # GPT-2's layers hold their weights the other way round
        is_turned = TRANSPOSED.fullmatch(next(iter(_plain({base: lower})))) is not None
        merged[base] = (merged[base].double() + (update.T if is_turned else update)).float()
    return merged
