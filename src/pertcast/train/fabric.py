"""Devices, machines and precision of a training, through Lightning Fabric: one process a device.

Invariant: the sets of a step are the same on any number of devices; each has an equal share of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.plugins.precision.amp import MixedPrecision
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.strategy import Strategy

from pertcast.config import TrainConfig
from pertcast.errors import ConfigError, Problem
from pertcast.processes import LostProcessError, Ranks, launched
from pertcast.train.loggers import make_loggers
from pertcast.train.sharding import sharding_strategy

__all__ = ["is_first_process", "num_processes", "one_process_for_all", "open_fabric", "products"]

# The first process may learn labels while the others wait; a dead one is found by its launcher, not by this.
_TIMEOUT = timedelta(hours=6)


def is_first_process() -> bool:
    """Return whether no launcher says that this is another than the first process."""
    ranks = launched()
    return ranks is None or ranks.rank == 0


def num_processes(config: TrainConfig) -> int:
    """Return how many processes train together: those that a launcher has started, else as many as `devices`.

    Raises
    ------
    ConfigError
        If the launcher says otherwise than the configuration, several machines have no launcher, or the sets of a step
        cannot be shared out equally.
    """
    ranks, problems = launched(), []
    size = config.devices if ranks is None else ranks.size
    if ranks is None and config.num_nodes > 1:
        message = f"{config.num_nodes} machines need a launcher that starts pertcast on each"
        problems.append(Problem("[train] num_nodes", message, "start it with torchrun or srun, see docs/devices.md"))
    if ranks is not None:
        asked = {"devices": (config.devices, ranks.local_size), "num_nodes": (config.num_nodes, ranks.num_nodes)}
        problems += [
            Problem(f"[train] {key}", f"{ranks.launcher} has started {there}, got {value}", "leave it out, or mend it")
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
    """Return Fabric for this process, connected to the others.

    Parameters
    ----------
    config
        Devices, precision, loggers.
    out
        The run's folder, where loggers write.
    some_unused
        Whether the loss may leave parameters of the network without a gradient.

    Raises
    ------
    ConfigError
        If the devices are not to be had here, or a logger's package is not installed.
    """
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
            f"[train] accelerator, devices: {config.accelerator!r} x {config.devices} is not to be had here ({error}); "
            'set train.accelerator to "auto" or "cpu", and train.devices to 1'
        ) from error
    if config.precision == "bf16":
        fabric.strategy.precision = _Autocast("bf16-mixed", fabric.device.type)
    fabric.launch()
    return fabric


class _Autocast(MixedPrecision):
    """Autocast that leaves what goes in as it is: products round it, and sums with control cells keep their digits."""

    def convert_input(self, data: Any) -> Any:
        """Return the same."""
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
    """Let float32 products be as short as the precision says, and put torch's own setting back at the end."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def one_process_for_all(size: int) -> Iterator[None]:
    """Turn the loss of contact that follows when another process dies into an error that says so.

    Raises
    ------
    LostProcessError
        If a collective operation fails.
    """
    try:
        yield
    except RuntimeError as error:
        is_contact = isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
        if size == 1 or not is_contact:
            raise
        raise LostProcessError(
            "another process of this training has ended, and its own message says why (none is there where it was "
            "killed, as when memory runs out); the same command goes on from the last checkpoint"
        ) from error
