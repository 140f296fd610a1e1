"""Networks that arc-state trained give arc-state's numbers; PERTCAST_ARC_PYTHON names a Python that has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arc_oracle import OPTIONS
from arc_peer import arc_runs, has_decoder, require_same_output, run_of
from pertcast.arc import ArcFolder, convert_run, read_arc_folder
from pertcast.errors import CheckpointError

__all__ = ["arc_runs"]


@pytest.mark.parametrize("name", OPTIONS)
def test_an_imported_network_gives_arc_states_output(arc_runs: Path, name: str) -> None:
    path = run_of(arc_runs, name)
    folder = read_arc_folder(path)
    assert list(folder.perts) == ["G1", "G2", "G3", "non-targeting"]
    assert (folder.batches, folder.contexts) == (("b1", "b2"), ("H1", "K562"))
    if name == "embedding" and has_decoder(folder):
        with pytest.raises(CheckpointError, match="output_space 'embedding' with a gene decoder is not supported"):
            convert_run(folder)
        return
    network = convert_run(folder)
    decodes = name in {"all_decoded", "embedding_to_hvg", "embedding_to_all"} or (
        name == "all_of_hvg" and has_decoder(folder)
    )
    assert (network.spec.output_space == "latent") == decodes
    # the first versions have no LoRA, and always let cells attend to each other
    assert any("LoRA" in note for note in network.notes) == any(".lora_A." in weight for weight in folder.weights)
    assert folder.is_early or ".lora_A." in str(list(folder.weights)) or "lora" not in name
    says = "bidirectional_attention" in folder.options["transformer_backbone_kwargs"]
    assert says != folder.is_early
    require_same_output(network.model(), path)


def small_folder(**options: Any) -> ArcFolder:
    """A folder as `state tx train` makes it, without files: one layer, three genes."""
    backbone: dict[str, Any] = {
        "bidirectional_attention": True,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 6,
    }
    backbone |= options.pop("transformer_backbone_kwargs", {})
    given = {
        "input_dim": 3,
        "output_dim": 3,
        "pert_dim": 2,
        "hidden_dim": 4,
        "embed_key": "X_hvg",
        "cell_set_len": 4,
        "transformer_backbone_key": "llama",
        "transformer_backbone_kwargs": {name: value for name, value in backbone.items() if value is not None},
        **options,
    }
    return ArcFolder(Path("run"), Path("run/final.ckpt"), {}, given, ("A", "B", "C"), {}, (), (), {}, 1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mask_attn": True}, "model.kwargs.mask_attn"),
        ({"finetune_vci_decoder": True}, "model.kwargs.finetune_vci_decoder"),
        ({"residual_decoder": True}, "model.kwargs.residual_decoder"),
        ({"nb_decoder": True}, "model.kwargs.nb_decoder"),
        ({"batch_predictor": True}, "model.kwargs.batch_predictor"),
        ({"activation": "relu"}, "model.kwargs.activation"),
        ({"a_new_option": 3}, "model.kwargs.a_new_option"),
        ({"transformer_backbone_key": "mamba"}, "model.kwargs.transformer_backbone_key"),
        ({"lora": {"enable": True, "use_dora": True}}, "model.kwargs.lora.use_dora"),
        ({"transformer_backbone_kwargs": {"bidirectional_attention": False}}, "bidirectional_attention"),
        ({"transformer_backbone_kwargs": {"bidirectional_attention": None}}, "bidirectional_attention: true"),
        ({"transformer_backbone_kwargs": {"hidden_act": "gelu"}}, "transformer_backbone_kwargs.hidden_act"),
        ({"transformer_backbone_kwargs": {"num_key_value_heads": 1}}, "num_key_value_heads"),
        ({"transformer_backbone_kwargs": {"sliding_window": 4}}, "sliding_window"),
    ],
)
def test_an_option_that_is_not_covered_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        convert_run(small_folder(**options))
    assert len(caught.value.problems) == 1
    assert named in str(caught.value)


def test_every_option_that_is_not_covered_is_named_at_once() -> None:
    with pytest.raises(CheckpointError) as caught:
        convert_run(small_folder(mask_attn=True, activation="relu"))
    assert len(caught.value.problems) == 2


def test_missing_weights_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"tensor pert_encoder.0.weight: expected shape \(4, 2\)"):
        convert_run(small_folder())
