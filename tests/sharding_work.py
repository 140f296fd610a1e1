"""What the processes of test_sharding.py measure; imported by them alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pertcast.config import ModelConfig, TrainConfig
from pertcast.models.spec import spec_for
from pertcast.models.state import StateTransition
from pertcast.progress import Progress
from pertcast.train.devices import open_fabric
from pertcast.train.update import make_optimizer


def measure(job: Mapping[str, Any], progress: Progress) -> None:
    """Take a step in bf16 and write down how much of everything is here, and what a call computes with."""
    config = TrainConfig(strategy="fsdp", devices=2, precision="bf16", accelerator="cpu")
    fabric = open_fabric(config, Path(job["out"]))
    spec = spec_for(
        ModelConfig(preset="tiny", set_size=8),
        num_genes=100, input_dim=100, output_dim=100, pert_dim=30, num_batches=0, num_contexts=1,
    )  # fmt: skip
    network = StateTransition(spec)
    whole = sum(parameter.numel() for parameter in network.parameters())
    model = fabric.setup_module(network)
    optimizer = make_optimizer(network, config, fabric.device)
    seen: dict[str, str] = {}
    for block, part, key in (("self_attn", "q_proj", "q_proj"), ("input_layernorm", "", "norm")):
        module = network.get_submodule(f"transformer_backbone.layers.0.{block}")
        # a block may read the weights of its parts without calling these
        module.register_forward_hook(
            lambda module, *_, part=part, key=key: seen.update({key: str(module.get_submodule(part).weight.dtype)})
        )
    fabric.backward(model(torch.ones(2, 8, 100), torch.ones(2, 30)).log1p_BSG.square().mean())
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    stepper: Any = fabric.setup_optimizers(optimizer)
    stepper.step()
    found: dict[str, list[Tensor]] = {"weights": list(network.parameters()), "gradients": gradients}
    for kind in ("exp_avg", "exp_avg_sq"):
        found[kind] = [state[kind] for state in optimizer.state.values()]
    here = {kind: sum(_local(value).numel() for value in values) for kind, values in found.items()}
    kept = sorted({str(value.dtype) for values in found.values() for value in values})
    Path(job["out"], str(fabric.global_rank)).write_text(json.dumps({**here, "all": whole, "seen": seen, "kept": kept}))


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
