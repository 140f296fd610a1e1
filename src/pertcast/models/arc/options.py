"""Which options of arc-state's networks are covered, and what they mean for ours; any other is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pertcast.errors import Problem

__all__ = ["GENE_KEYS", "BackboneShape", "backbone_shape", "option_problems"]

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
_IDLE = frozenset(
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
    """Return every option that is not covered, by name; `is_early` is a folder's."""
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
    return Problem(option, f"the value {value!r} of this option is not covered{covered}")


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
                "later ones then mask and rotate positions, which is not covered",
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
        elif name not in _IDLE | (_LLAMA_SHAPE | _NOT_FOR_LLAMA if is_llama else _GPT2_SHAPE | _NOT_FOR_GPT2) and value:
            problems.append(_not_covered(f"{place}.{name}", value))
    lora = dict(options.get("lora") or {})
    if lora.get("enable"):
        for name in ("use_rslora", "use_dora"):
            if lora.get(name):
                problems.append(_not_covered(f"model.kwargs.lora.{name}", lora[name], expected=False))
    return problems


def backbone_shape(options: Mapping[str, Any], *, hidden: int) -> BackboneShape:
    """Return the backbone's shape; the options are covered.

    Raises
    ------
    KeyError
        If an option is missing that the shape depends on.
    """
    given = options["transformer_backbone_kwargs"]
    if options.get("transformer_backbone_key", "GPT2") == "llama":
        heads = int(given["num_attention_heads"])
        head_dim = int(given.get("head_dim") or hidden // heads)
        return BackboneShape("llama", int(given["num_hidden_layers"]), heads, head_dim, int(given["intermediate_size"]))
    layers = int(given["n_layer"] if "n_layer" in given else given["num_hidden_layers"])
    heads = int(given["n_head"] if "n_head" in given else given["num_attention_heads"])
    return BackboneShape("gpt2", layers, heads, hidden // heads, int(given.get("n_inner") or 4 * hidden))
