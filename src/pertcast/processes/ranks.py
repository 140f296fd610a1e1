"""Which of several processes this one is, as torchrun, srun or pertcast itself says it in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal, NamedTuple

from pertcast.errors import ConfigError, PertcastError

__all__ = ["LostProcessError", "Ranks", "launched"]


class Ranks(NamedTuple):
    """One process among those of a command.

    Attributes
    ----------
    rank, size
        Its number, and how many there are on all machines.
    local_rank, local_size
        Its number on its machine, and how many there are on it.
    num_nodes
        Machines.
    launcher
        Who started them.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    num_nodes: int = 1
    launcher: Literal["torchrun", "srun"] = "torchrun"

    def __str__(self) -> str:
        """Return ``process 2 of 4``, counted from 1."""
        return f"process {self.rank + 1} of {self.size}"


class LostProcessError(PertcastError):
    """Another process has ended; its own error says why."""


_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# SLURM_NTASKS and SLURM_PROCID are there in a batch script, too; a step's number only where srun started the process.
_SRUN = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NNODES")
_SRUN_STEP = "SLURM_STEP_ID"


def launched(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """Return which process this is, or ``None`` where no launcher has started several.

    Raises
    ------
    ConfigError
        If the launcher's variables are no numbers, or machines do not have equally many processes.

    Examples
    --------
    >>> launched({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    Ranks(rank=3, size=4, local_rank=1, local_size=2, num_nodes=2, launcher='torchrun')
    >>> launched({}) is None
    True
    """
    if all(name in environment for name in _TORCHRUN):
        rank, size, local_rank, local_size = _numbers(environment, _TORCHRUN)
        num_nodes, launcher = size // max(local_size, 1), "torchrun"
    elif _SRUN_STEP in environment and all(name in environment for name in _SRUN):
        rank, size, local_rank, num_nodes = _numbers(environment, _SRUN)
        local_size, launcher = size // max(num_nodes, 1), "srun"
    else:
        return None
    if size <= 1:
        return None
    if local_size * num_nodes != size or not local_rank < local_size:
        raise ConfigError(
            f"{launcher}: expected equally many processes on each machine, got {size} on {num_nodes}; "
            "start as many on each as it has devices (srun: --ntasks-per-node)"
        )
    return Ranks(rank, size, local_rank, local_size, num_nodes, "torchrun" if launcher == "torchrun" else "srun")


def _numbers(environment: Mapping[str, str], names: tuple[str, ...]) -> list[int]:
    try:
        return [int(environment[name]) for name in names]
    except ValueError:
        found = ", ".join(f"{name}={environment[name]!r}" for name in names)
        raise ConfigError(f"expected numbers in the launcher's variables, got {found}; unset them") from None
