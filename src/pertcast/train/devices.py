"""Devices, machines, precision, loggers and sharding, through Lightning Fabric: one process for each device.

Invariant: the sets of a step are the same on any number of devices; each has an equal share of them.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers.logger import Logger
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.plugins.precision.amp import MixedPrecision
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from lightning_fabric.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pertcast.config import TrainConfig
from pertcast.errors import ConfigError, Problem
from pertcast.models.state import StateTransition
from pertcast.processes import LostProcessError, Ranks, launched

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def make_loggers(names: Sequence[str], out: Path) -> list[Logger]:
    """Return Fabric's loggers by name; they write into the run's folder, on the first process alone."""
    problems = [
        Problem(f"[train] loggers {name!r}", f"the package {package} is not installed", f"pip install {package}")
        for name, package in _PACKAGES.items()
        if name in names and find_spec(package) is None
    ]
    if problems:
        raise ConfigError(problems=problems)
    loggers: list[Logger] = []
    ranks = launched()
    if ranks is not None and ranks.rank:
        return loggers
    if "tensorboard" in names:
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger

        loggers.append(TensorBoardLogger(out, name="tensorboard", version=""))
    if "wandb" in names:
        loggers.append(_WandbLogger(out))
    return loggers


class _WandbLogger(Logger):
    """The part of Fabric's logger that the loop uses, on wandb; a resumed run keeps its id."""

    def __init__(self, out: Path) -> None:
        identifier = hashlib.blake2b(str(out.absolute()).encode(), digest_size=8).hexdigest()
        self._run = import_module("wandb").init(
            project="pertcast", name=out.name, dir=out, id=identifier, resume="allow"
        )

    @property
    def name(self) -> str:
        """Name of the project."""
        return "pertcast"

    @property
    def version(self) -> str:
        """Identifier of the run."""
        return str(self._run.id)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers of a step."""
        self._run.log(dict(metrics), step=step)

    def log_hyperparams(self, params: dict[str, Any] | argparse.Namespace, *_: Any, **__: Any) -> None:
        """Log the settings."""
        self._run.config.update(params if isinstance(params, dict) else vars(params))

    def finalize(self, status: str) -> None:
        """End the run."""
        self._run.finish(exit_code=int(status != "success"))


_MESH = "data_parallel"


def sharding_strategy(num_devices: int, *, bf16: bool, **options: Any) -> ModelParallelStrategy:
    """Return Fabric's strategy that passes the network to :func:`shard`; it also runs on CPUs."""
    return ModelParallelStrategy(
        partial(shard, bf16=bf16), data_parallel_size=num_devices, tensor_parallel_size=1, **options
    )


def is_sharded(fabric: Fabric) -> bool:
    """Return whether the network is sharded; then all processes must join each of its calls."""
    return isinstance(fabric.strategy, ModelParallelStrategy)


def shard(network: StateTransition, mesh: DeviceMesh, *, bf16: bool) -> StateTransition:
    """Shard a network's parameters over the devices of a mesh, in place."""
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
    """Yield the modules that are gathered together, in the order of the forward pass."""
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
    """Copy an output that is a view: changed in place, it would lose the hook that gathers weights."""
    return output.clone() if output._is_view() else output


def whole(value: Tensor) -> Tensor:
    """Return a tensor without gradient, gathered on the CPU if it is a shard; all processes must call it."""
    value = value.detach()
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def whole_tensors(tensors: Mapping[str, Tensor], *, keep: bool, copy: bool = False) -> dict[str, Tensor]:
    """Return gathered tensors, one after the other; a process that does not keep them only takes part."""
    found = {}
    for name, value in tensors.items():
        gathered = whole(value)
        if keep:
            found[name] = gathered.to("cpu", copy=True) if copy else gathered
    return found


def sharded_like(value: Tensor, other: Tensor) -> Tensor:
    """Return a tensor on another one's device, or this device's shard of it."""
    value = value.to(other.device)
    if not isinstance(other, DTensor):
        return value
    # every process has the whole, so nothing needs to travel
    return distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)


# The first process may learn labels while the others wait; a dead one is found by its launcher, not by this.
_TIMEOUT = timedelta(hours=6)


def is_first_process() -> bool:
    """Return whether this is the first process, or the only one."""
    ranks = launched()
    return ranks is None or ranks.rank == 0


def num_processes(config: TrainConfig) -> int:
    """Return the number of training processes: those of a launcher, else `devices`."""
    ranks, problems = launched(), []
    size = config.devices if ranks is None else ranks.size
    if ranks is None and config.num_nodes > 1:
        message = f"{config.num_nodes} machines need a launcher that starts pertcast on each"
        problems.append(Problem("[train] num_nodes", message, "start it with torchrun or srun, see docs/devices.md"))
    if ranks is not None:
        asked = {"devices": (config.devices, ranks.local_size), "num_nodes": (config.num_nodes, ranks.num_nodes)}
        problems += [
            Problem(
                f"[train] {key}", f"{ranks.launcher} has started {there}, got {value}", "leave it out, or correct it"
            )
            for key, (value, there) in asked.items()
            if value not in (1, there)
        ]
    if config.sets_per_step % size:
        message = f"expected a multiple of devices = {size}, got {config.sets_per_step}"
        problems.append(Problem("[train] sets_per_step", message, "change one of the two"))
    if problems:
        raise ConfigError(problems=problems)
    return size


def open_fabric(config: TrainConfig, out: Path, *, some_unused: bool = False) -> Fabric:
    """Return Fabric for this process, connected to the others."""
    num_processes(config)
    # Lightning's own greetings come once for each process.
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    ranks, loggers = launched(), make_loggers(config.loggers, out)
    try:
        fabric = Fabric(
            accelerator=config.accelerator,
            devices=1 if ranks is None else ranks.local_size,
            num_nodes=1 if ranks is None else ranks.num_nodes,
            strategy="auto" if ranks is None else _strategy(config, ranks, some_unused=some_unused),
            precision="bf16-mixed" if config.precision == "bf16" else "32-true",
            plugins=[_environment(ranks)],
            loggers=loggers,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"[train] accelerator, devices: {config.accelerator!r} x {config.devices} is not available here ({error}); "
            'set train.accelerator to "auto" or "cpu", and train.devices to 1'
        ) from error
    if config.precision == "bf16":
        fabric.strategy.precision = _Autocast("bf16-mixed", fabric.device.type)
    fabric.launch()
    return fabric


class _Autocast(MixedPrecision):
    """Autocast that leaves inputs in float32: products round them, and sums with control cells stay exact."""

    def convert_input(self, data: Any) -> Any:
        return data


def _strategy(config: TrainConfig, ranks: Ranks, *, some_unused: bool) -> Strategy:
    if config.strategy == "fsdp":
        return sharding_strategy(ranks.size, bf16=config.precision == "bf16", timeout=_TIMEOUT)
    # Buffers are constants; sent at each call, every process would have to meet there, also where one alone predicts.
    return DDPStrategy(
        timeout=_TIMEOUT, find_unused_parameters=some_unused, gradient_as_bucket_view=True, broadcast_buffers=False
    )


def _environment(ranks: Ranks | None) -> ClusterEnvironment:
    if ranks is None:
        return LightningEnvironment()
    return TorchElasticEnvironment() if ranks.launcher == "torchrun" else SLURMEnvironment(auto_requeue=False)


@contextmanager
def products(config: TrainConfig) -> Iterator[None]:
    """Set torch's precision of float32 products, and restore it at the end; beside bf16 a GPU rounds them to tf32."""
    before = torch.get_float32_matmul_precision()
    rounded = config.precision == "tf32" or (config.precision == "bf16" and torch.cuda.is_available())
    torch.set_float32_matmul_precision("high" if rounded else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def one_process_for_all(size: int) -> Iterator[None]:
    """Turn the lost contact that follows another process's death into an error that says so."""
    try:
        yield
    except RuntimeError as error:
        is_contact = isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
        if size == 1 or not is_contact:
            raise
        raise LostProcessError(
            "another process of this training has ended. Its own message says why, unless it was killed, for example "
            "when memory ran out. Run the same command again to resume from the last checkpoint"
        ) from error
