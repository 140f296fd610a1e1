"""Where metrics go beside metrics.jsonl, when asked: TensorBoard, Weights & Biases."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import Logger

from pertcast.errors import ConfigError, Problem
from pertcast.processes import launched

__all__ = ["make_loggers"]

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def make_loggers(names: Sequence[str], out: Path) -> list[Logger]:
    """Return Fabric's loggers by name; they write into the run's folder. Only the first process has any.

    Raises
    ------
    ConfigError
        Naming every package that is not installed, with the command that installs it.
    """
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
    """The few calls of Fabric's logger that the loop makes, on wandb; a resumed run goes on under its own id."""

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
        """Keep the configuration."""
        self._run.config.update(params if isinstance(params, dict) else vars(params))

    def finalize(self, status: str) -> None:
        """End the run."""
        self._run.finish(exit_code=int(status != "success"))
