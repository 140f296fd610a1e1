"""Small networks and inputs that several tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pertcast.config import ModelConfig
from pertcast.models.spec import StateSpec, spec_for


def tiny_spec(**changes: Any) -> StateSpec:
    num_genes = changes.pop("num_genes", 9)
    config = ModelConfig(preset="tiny", **changes)
    output_dim = 5 if config.input.startswith("obsm:") else num_genes
    return spec_for(
        config,
        num_genes=num_genes,
        input_dim=output_dim,
        output_dim=output_dim,
        pert_dim=4,
        num_batches=3,
        num_contexts=2,
    )


def inputs(spec: StateSpec, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(2, spec.set_size, spec.input_dim, generator=generator),
        torch.rand(2, spec.pert_dim, generator=generator),
        torch.randint(0, 3, (2, spec.set_size), generator=generator),
        torch.tensor([1, 0]),
    )
