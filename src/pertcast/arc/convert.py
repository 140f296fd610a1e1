"""Convert an arc-state folder to our network: its specification, weights and names.

Invariants: the network computes what arc-state's computes from the same input. LoRA is merged. Weights that arc-state's
forward pass does not read are left out, with a note.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pertcast.arc.read_folder import ArcFolder
from pertcast.errors import CheckpointError, Problem
from pertcast.models.run_folder import require_shapes
from pertcast.models.spec import StateSpec
from pertcast.models.state import StateTransition

GENE_KEYS = (None, "X_hvg")

# options that the network is made by
_COVERED = frozenset(
    [
        "input_dim",
        "hidden_dim",
        "output_dim",
        "pert_dim",
        "batch_dim",
        "gene_dim",
        "hvg_dim",
        "dropout",
        "embed_key",
        "output_space",
        "gene_names",
        "cell_set_len",
        "predict_residual",
        "n_encoder_layers",
        "n_decoder_layers",
        "use_basal_projection",
        "batch_encoder",
        "use_batch_token",
        "confidence_token",
        "gene_decoder_bool",
        "decoder_cfg",
        "transformer_backbone_key",
        "transformer_backbone_kwargs",
        "lora",
        "control_pert",
        "extra_tokens",
    ]
)
# options that say how it was trained, or that arc-state's forward pass does not read
_TRAINING = frozenset(
    [
        "lr",
        "loss_fn",
        "loss",
        "blur",
        "batch_size",
        "wandb_track",
        "weight_decay",
        "max_steps",
        "train_seed",
        "val_freq",
        "ckpt_every_n_steps",
        "gradient_clip_val",
        "gradient_accumulation_steps",
        "devices",
        "strategy",
        "use_mfu",
        "mfu_kwargs",
        "cumulative_flops_use_backward",
        "basal_mapping_strategy",
        "distributional_loss",
        "mmd_num_chunks",
        "randomize_mmd_chunks",
        "softplus",
        "freeze_pert_backbone",
        "freeze_pert",
        "init_from",
        "decoder_hidden_dims",
        "decoder_weight",
        "decoder_loss_weight",
        "regularization",
        "detach_decoder",
        "sinkhorn_weight",
        "energy_weight",
        "confidence_weight",
        "confidence_target_scale",
        "batch_token_weight",
        "batch_predictor_weight",
        "predict_mean",
        "confidence_head",
        "llm_name",
        "use_effect_gating_token",
        "transformer_decoder",
    ]
)
_LLAMA_SHAPE = frozenset(["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"])
_GPT2_SHAPE = frozenset(
    ["n_embd", "n_layer", "n_head", "n_inner", "hidden_size", "num_hidden_layers", "num_attention_heads", "n_ctx"]
)
# what neither backbone's output depends on: vocabulary, caches, dropout in training, positions that are not used
_IDLE_OPTIONS = frozenset(
    [
        "max_position_embeddings",
        "n_positions",
        "use_cache",
        "attention_dropout",
        "hidden_dropout",
        "layer_norm_eps",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "tie_word_embeddings",
        "rotary_dim",
        "use_rotary_embeddings",
        "vocab_size",
        "initializer_range",
        "attn_pdrop",
        "resid_pdrop",
        "embd_pdrop",
        "rope_theta",
        "rope_scaling",
        "pretraining_tp",
    ]
)
_LLAMA_ONLY = {
    "bidirectional_attention": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
}
_GPT2_ONLY = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
}
# read by the other backbone alone
_NOT_FOR_LLAMA = frozenset(["n_embd", "n_layer", "n_head"])
_NOT_FOR_GPT2 = frozenset(["intermediate_size", "num_key_value_heads", "head_dim", "bidirectional_attention"])


class BackboneShape(NamedTuple):
    """The shape of a backbone."""

    kind: Literal["llama", "gpt2"]
    layers: int
    heads: int
    head_dim: int
    feedforward: int


def option_problems(options: Mapping[str, Any], *, is_early: bool = False) -> list[Problem]:
    """Return every option that is not supported, by name."""
    problems = []
    for name, value in options.items():
        if name in _COVERED or name in _TRAINING or not value:
            continue
        if name == "activation" and str(value).lower() == "gelu":
            continue
        problems.append(_not_covered(f"model.kwargs.{name}", value))
    return problems + _backbone_problems(options, is_early=is_early)


def _not_covered(option: str, value: Any, expected: object = None) -> Problem:
    covered = f"; covered is {expected!r}" if expected is not None else ""
    return Problem(option, f"the value {value!r} of this option is not supported{covered}")


def _backbone_problems(options: Mapping[str, Any], *, is_early: bool) -> list[Problem]:
    key, given = options.get("transformer_backbone_key", "GPT2"), dict(options.get("transformer_backbone_kwargs") or {})
    place = "model.kwargs.transformer_backbone_kwargs"
    if key not in ("llama", "GPT2"):
        return [_not_covered("model.kwargs.transformer_backbone_key", key, "llama or GPT2")]
    is_llama = key == "llama"
    problems = []
    if is_llama and "bidirectional_attention" not in given and not is_early:
        problems.append(
            Problem(
                f"{place}.bidirectional_attention",
                "config.yaml does not say it: early versions of arc-state always let all cells attend to each other, "
                "later ones then mask and rotate positions, which is not supported",
                "if an early one trained it, add `bidirectional_attention: true` there",
            )
        )
    wanted = _LLAMA_ONLY if is_llama else _GPT2_ONLY
    for name, value in given.items():
        if name in wanted:
            if value != wanted[name]:
                problems.append(_not_covered(f"{place}.{name}", value, wanted[name]))
        elif name == "num_key_value_heads" and is_llama:
            if value not in (None, given.get("num_attention_heads", value)):
                problems.append(_not_covered(f"{place}.{name}", value, given.get("num_attention_heads")))
        elif (
            name not in _IDLE_OPTIONS | (_LLAMA_SHAPE | _NOT_FOR_LLAMA if is_llama else _GPT2_SHAPE | _NOT_FOR_GPT2)
            and value
        ):
            problems.append(_not_covered(f"{place}.{name}", value))
    lora = dict(options.get("lora") or {})
    if lora.get("enable"):
        for name in ("use_rslora", "use_dora"):
            if lora.get(name):
                problems.append(_not_covered(f"model.kwargs.lora.{name}", lora[name], expected=False))
    return problems


def backbone_shape(options: Mapping[str, Any], *, hidden: int) -> BackboneShape:
    """Return the backbone's shape from supported options."""
    given = options["transformer_backbone_kwargs"]
    if options.get("transformer_backbone_key", "GPT2") == "llama":
        heads = int(given["num_attention_heads"])
        head_dim = int(given.get("head_dim") or hidden // heads)
        return BackboneShape("llama", int(given["num_hidden_layers"]), heads, head_dim, int(given["intermediate_size"]))
    layers = int(given["n_layer"] if "n_layer" in given else given["num_hidden_layers"])
    heads = int(given["n_head"] if "n_head" in given else given["num_attention_heads"])
    return BackboneShape("gpt2", layers, heads, hidden // heads, int(given.get("n_inner") or 4 * hidden))


_LORA = re.compile(r"(.+)\.lora_([AB])\.[^.]+\.weight")
TRANSPOSED = re.compile(r"transformer_backbone\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
# vocabularies, which cells do not have; a buffer of masks; positions, which arc-state sets to zero
_IDLE = re.compile(r"transformer_backbone\.(embed_tokens\.weight|wte\.weight|wpe\.weight|h\.\d+\.attn\.(masked_)?bias)")
_POSITIONS = "transformer_backbone.wpe.weight"


@dataclass(frozen=True)
class ArcNames:
    """The genes that a network reads and predicts, in its order."""

    inputs: tuple[str, ...]  # Genes that it reads; empty if it reads an embedding
    outputs: tuple[str, ...]  # Genes that it predicts; empty if it gives an embedding
    embedding: str | None  # The ``obsm`` key that it reads, or ``None``


@dataclass(frozen=True)
class ArcNetwork:
    """A converted network."""

    spec: StateSpec  # Our network
    weights: dict[str, Tensor]
    notes: tuple[str, ...]  # What was left out

    def model(self) -> StateTransition:
        """Return the network with its weights, in evaluation mode."""
        with torch.device("meta"):
            model = StateTransition(self.spec)
        model.load_state_dict(self.weights, assign=True)
        return model.eval()


def convert_run(folder: ArcFolder) -> ArcNetwork:
    """Return the folder's network as ours."""
    problems = option_problems(folder.options, is_early=folder.is_early)
    if problems:
        raise CheckpointError(
            f"{folder.path}: {len(problems)} option(s) that pertcast does not support", problems=problems
        )
    weights, notes = _tensors(folder)
    try:
        spec, left_out = _spec(folder, weights)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder.path}: its options are incomplete ({type(error).__name__}: {error}); "
            "correct config.yaml, or give another folder"
        ) from None
    if left_out:
        weights = {name: value for name, value in weights.items() if not name.startswith(left_out)}
        notes.append(f"weights that its output does not depend on were left out: {', '.join(left_out)}")
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in StateTransition(spec).state_dict().items()}
    require_shapes(folder.checkpoint, {name: tuple(value.shape) for name, value in weights.items()}, expected)
    return ArcNetwork(spec, weights, tuple(notes))


def _spec(folder: ArcFolder, weights: dict[str, Tensor]) -> tuple[StateSpec, tuple[str, ...]]:
    """Return the specification, and the name prefixes of weights that nothing depends on."""
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
            f"{folder.path}: output_space {arc_space!r} with a gene decoder is not supported; train with output_space "
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
            f"{folder.checkpoint}: {_POSITIONS} is not zero; cells with positions are not supported",
            problems=[
                Problem("model.kwargs.transformer_backbone_key", "GPT2 with position embeddings is not supported")
            ],
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
    """Return weights without the wrappers that LoRA adds."""
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


def network_names(
    folder: ArcFolder, network: ArcNetwork, *, genes: Sequence[str] = (), hvgs: Sequence[str] = ()
) -> ArcNames:
    """Return the names of a network's inputs and outputs."""
    embed_key, arc_space = folder.options.get("embed_key"), folder.options.get("output_space", "gene")
    spec, problems = network.spec, []
    own = folder.gene_names
    # var_dims.pkl names the genes of the output space: the highly variable ones, or all
    named_hvgs, named_genes = (own, ()) if arc_space == "gene" else ((), own)

    def choose(what: str, option: str, num: int, *lists: Sequence[str]) -> tuple[str, ...]:
        for names in lists:
            if len(names) == num and len(set(names)) == num:
                return tuple(names)
        found = ", ".join(f"{len(names):,}" for names in lists if names) or "no list"
        message = f"expected {num:,} different names of the genes {what}, got {found}"
        problems.append(Problem(str(folder.path), message, f"list them, one a line in their order, with {option} FILE"))
        return ()

    outputs: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    if spec.output_space == "gene":
        if embed_key is None:
            outputs = choose("that it reads and gives", "--genes", spec.output_dim, genes, named_genes, named_hvgs)
        else:
            outputs = choose("that it reads and gives", "--hvgs", spec.output_dim, hvgs, named_hvgs, named_genes)
        inputs = outputs
    elif spec.output_space == "latent":
        wide = arc_space == "all"
        lists = (genes, named_genes) if wide else (hvgs, named_hvgs)
        outputs = choose("that it gives", "--genes" if wide else "--hvgs", spec.num_genes, *lists)
        if embed_key in GENE_KEYS:
            inputs = choose("that it reads", "--hvgs", spec.input_dim, hvgs, named_hvgs)
    lost = sorted(set(inputs) - set(outputs))
    if lost and not problems:
        problems.append(Problem(str(folder.path), f"genes that it reads are not among those it gives: {lost[:5]}"))
    if problems:
        raise CheckpointError(problems=problems)
    return ArcNames(inputs, outputs, None if embed_key in GENE_KEYS else str(embed_key))
