from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pertcast.config import ModelConfig
from pertcast.errors import ConfigError
from pertcast.models.spec import PRESETS, spec_for
from pertcast.models.state import StateTransition
from small_networks import inputs, tiny_spec


def slow_forward(model: StateTransition, control: Tensor, pert: Tensor) -> list[list[float]]:
    """One set, cell by cell and head by head, from the weights alone."""
    weights, spec = model.state_dict(), model.spec

    def linear(name: str, x: Tensor) -> Tensor:
        product: Tensor = weights[f"{name}.weight"] @ x
        bias: Tensor = weights.get(f"{name}.bias", torch.zeros(()))
        return product + bias

    def mlp(name: str, x: Tensor, layers: int) -> Tensor:
        for layer in range(layers):
            x = linear(f"{name}.{3 * layer}", x)
            if layer + 1 < layers:
                x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return x

    def norm(name: str, x: Tensor) -> Tensor:
        scale: Tensor = weights[f"{name}.weight"]
        return scale * x / torch.sqrt((x**2).mean() + 1e-6)

    basal = [linear("basal_encoder", cell) for cell in control]
    hidden = [cell + mlp("pert_encoder", pert, spec.encoder_layers) for cell in basal]
    for number in range(spec.layers):
        layer = f"transformer_backbone.layers.{number}"
        normed = [norm(f"{layer}.input_layernorm", cell) for cell in hidden]
        query, key, value = (
            [linear(f"{layer}.self_attn.{part}_proj", cell) for cell in normed] for part in ("q", "k", "v")
        )
        for i in range(len(hidden)):
            heads = []
            for head in range(spec.heads):
                part = slice(head * spec.head_dim, (head + 1) * spec.head_dim)
                scores = torch.stack([query[i][part] @ k[part] / math.sqrt(spec.head_dim) for k in key])
                shares = scores.exp() / scores.exp().sum()
                heads.append(sum((share * v[part] for share, v in zip(shares, value, strict=True)), torch.zeros(())))
            hidden[i] = hidden[i] + linear(f"{layer}.self_attn.o_proj", torch.cat(heads))
        for i, cell in enumerate(hidden):
            normed_cell = norm(f"{layer}.post_attention_layernorm", cell)
            gate = linear(f"{layer}.mlp.gate_proj", normed_cell)
            up = linear(f"{layer}.mlp.up_proj", normed_cell)
            hidden[i] = cell + linear(f"{layer}.mlp.down_proj", gate / (1 + (-gate).exp()) * up)
    out = [
        mlp("project_out", norm("transformer_backbone.norm", h) + b, spec.decoder_layers)
        for h, b in zip(hidden, basal, strict=True)
    ]
    return [[max(float(value), 0.0) for value in cell] for cell in out]


def test_it_is_its_slow_twin() -> None:
    spec = tiny_spec(set_size=5, hidden=12, heads=3, feedforward=20, encoder_layers=3, decoder_layers=2)
    model = StateTransition(spec).eval()
    control, pert, _, _ = inputs(spec)
    with torch.no_grad():
        for parameter in model.parameters():  # far from the small initial weights, so that every part matters
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
        fast = model(control, pert).log1p_BSG
        slow = torch.tensor([slow_forward(model, *one) for one in zip(control, pert, strict=True)])
    assert (slow > 0).any()
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("tiny", (32, 64, 2, 4, 16)), ("state_sm", (128, 672, 4, 8, 84)), ("state", (512, 768, 8, 12, 64))],
)
def test_presets(preset: Any, expected: tuple[int, ...]) -> None:
    spec = spec_for(
        ModelConfig(preset=preset), num_genes=7, input_dim=7, output_dim=7, pert_dim=3, num_batches=2, num_contexts=1
    )
    assert (spec.set_size, spec.hidden, spec.layers, spec.heads, spec.head_dim) == expected
    assert (spec.num_batches, spec.num_contexts) == (0, 0)
    assert set(PRESETS) == {"tiny", "state_sm", "state"}


def test_a_head_count_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="divisor of hidden = 64, got 5"):
        tiny_spec(heads=5)


def test_cells_of_a_set_are_exchangeable_and_sets_do_not_mix() -> None:
    spec = tiny_spec(batch_embedding=True, context_embedding=True)
    model = StateTransition(spec).eval()
    control, pert, batch, context = inputs(spec)
    order = torch.randperm(spec.set_size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole = model(control, pert, batch, context).log1p_BSG
        torch.testing.assert_close(model(control[:, order], pert, batch[:, order], context).log1p_BSG, whole[:, order])
        alone = model(control[1:], pert[1:], batch[1:], context[1:]).log1p_BSG
    torch.testing.assert_close(alone, whole[1:])


def test_batch_and_context_matter_and_an_unknown_batch_starts_neutral() -> None:
    spec = tiny_spec(batch_embedding=True, context_embedding=True)
    assert (spec.num_batches, spec.num_contexts) == (4, 2)
    model = StateTransition(spec).eval()
    control, pert, batch, context = inputs(spec)
    with torch.no_grad():
        known = model(control, pert, batch, context).log1p_BSG
        assert not torch.equal(known, model(control, pert, (batch + 1) % 3, context).log1p_BSG)
        assert not torch.equal(known, model(control, pert, batch, 1 - context).log1p_BSG)
        unknown = model(control, pert, torch.full_like(batch, -1), context).log1p_BSG
        assert model.batch_encoder is not None
        model.batch_encoder.weight.zero_()
        torch.testing.assert_close(unknown, model(control, pert, batch, context).log1p_BSG)
    with pytest.raises(ValueError, match="batch_BS"):
        model(control, pert, None, context)
    with pytest.raises(ValueError, match="context_B"):
        model(control, pert, batch)


def test_an_embedding_has_a_decoder_to_genes() -> None:
    spec = tiny_spec(input="obsm:X_pca", num_genes=11)
    model = StateTransition(spec).eval()
    prediction = model(*inputs(spec)[:2])
    assert prediction.latent_BSO.shape == (2, 32, 5)
    assert (prediction.latent_BSO < 0).any()
    assert prediction.genes_BSG is not None
    assert prediction.log1p_BSG.shape == (2, 32, 11)
    assert (prediction.log1p_BSG >= 0).all()


def test_without_residual_the_control_cell_is_only_seen_through_the_backbone() -> None:
    spec = tiny_spec(residual="none")
    model, other = StateTransition(spec).eval(), StateTransition(tiny_spec()).eval()
    other.load_state_dict(model.state_dict())
    control, pert, _, _ = inputs(spec)
    assert not torch.equal(model(control, pert).log1p_BSG, other(control, pert).log1p_BSG)


@pytest.mark.parametrize("kind", ["genes", "obsm:X"])
def test_it_can_start_at_the_mean(kind: str) -> None:
    spec = tiny_spec(input=kind)
    model = StateTransition(spec).eval()
    mean = torch.linspace(0, 4, spec.num_genes)
    model.start_at_mean(mean)
    assert (model(*inputs(spec)[:2]).log1p_BSG.mean((0, 1)) - mean).abs().max() < 0.5
    with pytest.raises(ValueError, match=f"{spec.num_genes} genes"):
        model.start_at_mean(mean[1:])


def test_weights_depend_on_the_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first, second = (StateTransition(tiny_spec(), generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
        assert torch.isfinite(value).all(), name
    query = first.state_dict()["transformer_backbone.layers.0.self_attn.q_proj.weight"]
    assert abs(query.std().item() - 0.02) < 0.002
    basal = first.state_dict()["basal_encoder.weight"]
    assert basal.abs().max() <= 1 / 3


@pytest.mark.parametrize("batches", [0, 3])
def test_arc_states_weights_give_arc_states_output(batches: int) -> None:
    module = pytest.importorskip("state.tx.models.state_transition", reason="arc-state is not installed")
    num_genes, pert_dim, set_size = 50, 7, 128
    torch.manual_seed(0)
    oracle = module.StateTransitionPerturbationModel(
        **arc_arguments(num_genes, pert_dim, set_size, batches=batches)
    ).eval()
    config = ModelConfig(preset="state_sm", batch_embedding=bool(batches))
    spec = spec_for(
        config,
        num_genes=num_genes,
        input_dim=num_genes,
        output_dim=num_genes,
        pert_dim=pert_dim,
        num_batches=batches - 1,
        num_contexts=1,
    )
    ours = StateTransition(spec).eval()
    weights = {name: value for name, value in oracle.state_dict().items() if "embed_tokens" not in name}
    ours.load_state_dict(weights)
    oracle.load_state_dict(ours.state_dict(), strict=False)
    control, pert = torch.rand(2, set_size, num_genes) * 3, torch.randn(2, pert_dim)
    batch = torch.randint(0, max(batches, 1), (2, set_size))
    given = {
        "ctrl_cell_emb": control.flatten(0, 1),
        "pert_emb": pert[:, None].expand(-1, set_size, -1).flatten(0, 1),
        "batch": batch.flatten(),
    }
    with torch.no_grad():
        expected = oracle(given).unflatten(0, (2, set_size))
        torch.testing.assert_close(ours(control, pert, batch).log1p_BSG, expected, atol=1e-5, rtol=1e-5)


def arc_arguments(num_genes: int, pert_dim: int, set_size: int, *, batches: int) -> dict[str, Any]:
    """The arguments that `state tx train model=state_sm` gives its network."""
    return {
        "input_dim": num_genes,
        "hidden_dim": 672,
        "output_dim": num_genes,
        "pert_dim": pert_dim,
        "gene_dim": num_genes,
        "hvg_dim": num_genes,
        "batch_dim": batches or None,
        "batch_encoder": bool(batches),
        "output_space": "gene",
        "embed_key": "X_hvg",
        "cell_set_len": set_size,
        "n_encoder_layers": 4,
        "n_decoder_layers": 4,
        "use_basal_projection": False,
        "gene_decoder_bool": False,
        "transformer_backbone_key": "llama",
        "transformer_backbone_kwargs": {
            "bidirectional_attention": True,
            "max_position_embeddings": set_size,
            "hidden_size": 672,
            "intermediate_size": 2688,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "head_dim": 84,
            "use_cache": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "layer_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "rotary_dim": 0,
            "use_rotary_embeddings": False,
        },
    }
