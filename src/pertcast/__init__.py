"""pertcast predicts how single cells respond to gene perturbations and packs a valid challenge submission.

Each stage is a function from paths and settings to a path or a report. Names are imported when they are first used, so
``import pertcast`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pertcast.config import Experiment, load_experiment
    from pertcast.data.prepare import prepare
    from pertcast.data.store import Store
    from pertcast.errors import CheckpointError, ConfigError, DataError, PertcastError, Problem, SubmissionError
    from pertcast.generate import generate as generate_parts
    from pertcast.ladder.ledger import read_ledger
    from pertcast.ladder.report import write_report
    from pertcast.pipeline import run_experiment
    from pertcast.seasons import SEASONS, Season, season
    from pertcast.submission.assemble import assemble
    from pertcast.submission.check import CheckReport, check
    from pertcast.submission.check.realism import RealismReport, realism
    from pertcast.submission.pack import pack, unpack
    from pertcast.train import train as train_run
    from pertcast.train.adapt import adapt as adapt_run
    from pertcast.train.new_line import adapted_experiment

__version__ = "0.1.0"

_HOMES = {
    "CheckReport": "submission.check:CheckReport",
    "CheckpointError": "errors:CheckpointError",
    "ConfigError": "errors:ConfigError",
    "DataError": "errors:DataError",
    "Experiment": "config:Experiment",
    "PertcastError": "errors:PertcastError",
    "Problem": "errors:Problem",
    "RealismReport": "submission.check.realism:RealismReport",
    "SEASONS": "seasons:SEASONS",
    "Season": "seasons:Season",
    "Store": "data.store:Store",
    "SubmissionError": "errors:SubmissionError",
    "adapt_run": "train.adapt:adapt",
    "adapted_experiment": "train.new_line:adapted_experiment",
    "assemble": "submission.assemble:assemble",
    "check": "submission.check:check",
    "generate_parts": "generate:generate",
    "load_experiment": "config:load_experiment",
    "pack": "submission.pack:pack",
    "prepare": "data.prepare:prepare",
    "read_ledger": "ladder.ledger:read_ledger",
    "realism": "submission.check.realism:realism",
    "run_experiment": "pipeline:run_experiment",
    "season": "seasons:season",
    "train_run": "train:train",
    "unpack": "submission.pack:unpack",
    "write_report": "ladder.report:write_report",
}

__all__ = [
    "SEASONS",
    "CheckReport",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Experiment",
    "PertcastError",
    "Problem",
    "RealismReport",
    "Season",
    "Store",
    "SubmissionError",
    "__version__",
    "adapt_run",
    "adapted_experiment",
    "assemble",
    "check",
    "generate_parts",
    "load_experiment",
    "pack",
    "prepare",
    "read_ledger",
    "realism",
    "run_experiment",
    "season",
    "train_run",
    "unpack",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pertcast' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f"pertcast.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
