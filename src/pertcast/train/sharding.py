"""Sharding (FSDP): each device holds a part of every parameter, of its gradient and of its moments.

The linear layers of a backbone layer come together on every device while they compute, and part again; so do those of
an encoder or a decoder. What is small (norms, embeddings, tokens) is one more such group.

Invariant: outside this file tensors are whole and bear the names that they have on one device, so that files know
nothing of shards and any number of devices goes on with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pertcast.models.state import StateTransition

__all__ = ["is_sharded", "shard", "sharded_like", "sharding_strategy", "whole", "whole_tensors"]

_MESH = "data_parallel"


def sharding_strategy(num_devices: int, *, bf16: bool, **options: Any) -> ModelParallelStrategy:
    """Return Fabric's strategy that hands the network to :func:`shard`; it runs on CPUs, too."""
    return ModelParallelStrategy(
        partial(shard, bf16=bf16), data_parallel_size=num_devices, tensor_parallel_size=1, **options
    )


def is_sharded(fabric: Fabric) -> bool:
    """Return whether this training shards its network: all processes must then meet in each of its calls."""
    return isinstance(fabric.strategy, ModelParallelStrategy)


def shard(network: StateTransition, mesh: DeviceMesh, *, bf16: bool) -> StateTransition:
    """Share a network's parameters out over the devices of a mesh, in place.

    Parameters
    ----------
    network
        The same on all devices.
    mesh
        Of Fabric's strategy.
    bf16
        Whether the linear layers' weights come together in bfloat16, which halves what travels; they are computed with
        in bfloat16 anyhow (autocast). What is kept, and the sum of gradients, stays float32.
    """
    devices = mesh[_MESH]
    lowered = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in _blocks(network):
        has_norm = any(isinstance(module, nn.LayerNorm | nn.RMSNorm) for part in block for module in part.modules())
        policy = lowered if bf16 and not has_norm else MixedPrecisionPolicy()
        for part in block:
            part.register_forward_hook(_own_output)
        fully_shard(block, mesh=devices, reshard_after_forward=True, mp_policy=policy)
    # Resharded after each call, so that parameters are shards whenever anything but a call looks at them.
    fully_shard(network, mesh=devices, reshard_after_forward=True)
    return network


def _blocks(network: StateTransition) -> Iterator[list[nn.Module]]:
    """Yield what comes together at once: modules that run one after the other."""
    (layers,) = (part for part in network.transformer_backbone.children() if isinstance(part, nn.ModuleList))
    for layer in layers:
        yield [part for part in layer.children() if not isinstance(part, nn.LayerNorm | nn.RMSNorm)]
    heads = [head.state for head in (network.de_head, network.counts_head) if head is not None]
    for part in (
        network.pert_encoder,
        network.basal_encoder,
        network.project_out,
        network.final_down_then_up,
        network.gene_decoder,
        *heads,
    ):
        if part is not None:
            yield [part]


def _own_output(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    """Copy an output that is a view: changed in place, it would lose the hook that gathers weights for its gradient."""
    return output.clone() if output._is_view() else output


def whole(value: Tensor) -> Tensor:
    """Return a tensor without a gradient, gathered on the CPU if it was a shard; all processes call it together."""
    value = value.detach()
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def whole_tensors(tensors: Mapping[str, Tensor], *, keep: bool, copy: bool = False) -> dict[str, Tensor]:
    """Return tensors whole, gathered one after the other; a process that does not keep them only takes part.

    With `copy`, they lie on the CPU and stay as they are while training goes on.
    """
    found = {}
    for name, value in tensors.items():
        gathered = whole(value)
        if keep:
            found[name] = gathered.to("cpu", copy=True) if copy else gathered
    return found


def sharded_like(value: Tensor, other: Tensor) -> Tensor:
    """Return a whole tensor on another one's device, and this device's part of it if that is a shard."""
    value = value.to(other.device)
    if not isinstance(other, DTensor):
        return value
    # every process has the whole, so nothing needs to travel
    return distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)
