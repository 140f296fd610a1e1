"""Training on disk: checkpoints, the identity of a run, and the log of metrics.

Invariants: a checkpoint is complete or absent. The log has one line for each finished step and none beyond. A folder
resumes only with the settings that it started with.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor, nn

from pertcast.config import Experiment, upgrade
from pertcast.data.features import PertFeatures, save_features
from pertcast.errors import CheckpointError, DataError, Problem
from pertcast.files.artefacts import (
    MANIFEST,
    Manifest,
    any_content,
    atomic_dir,
    atomic_file,
    hash_file,
    read_json,
    read_manifest,
    remove_leftovers,
    verify_artefact,
    write_json,
    write_manifest,
)
from pertcast.models.baselines import Baseline, save_baseline
from pertcast.models.run_folder import BASE, RUN_JSON, WEIGHTS, load_tensors, load_weights, open_run, save_tensors
from pertcast.train.devices import sharded_like

CHECKPOINTS = "checkpoints"
IDENTITY = "training.json"
METRICS = "metrics.jsonl"
FEATURES = "features"
_OPTIMIZER, _BEST, _STATE = "optimizer.safetensors", "best.safetensors", "state.json"
_NUM_KEPT = 2
# They change the length, the logging or the devices of a training, not the weights after a step (up to rounding).
_FREE_KEYS = frozenset({"steps", "checkpoint_every", "loggers", "devices", "num_nodes", "strategy", "compile", "cells"})


@dataclass
class TrainState:
    """The state of the loop after a finished step."""

    step: int = 0  # Steps done
    epoch: int = 0  # The position in the stream of sets
    offset: int = 0
    validated: int = -1  # The last step that was validated, -1 before the first
    # The best validated step, its validation loss, and the value that it was selected by (the lower the
    # better); -1 and infinity before the first
    best_step: int = -1
    best_loss: float = float("inf")
    num_worse: int = 0  # Validations since then
    best_value: float = float("inf")


class SavedState(NamedTuple):
    """A checkpoint: its folder, and the state of training."""

    folder: Path
    state: TrainState


def save_state(
    out: Path,
    state: TrainState,
    *,
    weights: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Tensor],
    best: Mapping[str, Tensor] | None,
) -> None:
    """Write a checkpoint of the last finished step, and remove all but the newest two."""
    folder = out / CHECKPOINTS / f"step_{state.step:09d}"
    with atomic_dir(folder) as temporary:
        save_tensors(temporary / WEIGHTS, weights)
        save_tensors(temporary / _OPTIMIZER, optimizer_state)
        if best is not None and state.best_step != state.step:
            save_tensors(temporary / _BEST, best)
        # JSON has no infinity.
        none = {} if state.best_step >= 0 else {"best_loss": None, "best_value": None}
        write_json(temporary / _STATE, {**asdict(state), **none})
        write_manifest(temporary, Manifest("checkpoint"))
    for old in _folders(out)[:-_NUM_KEPT]:
        shutil.rmtree(old)


def _folders(out: Path) -> list[Path]:
    return sorted(path for path in (out / CHECKPOINTS).glob("step_*") if path.is_dir())


def load_newest(out: Path) -> tuple[SavedState | None, list[str]]:
    """Return the newest complete checkpoint, if any, and a sentence on each damaged newer one."""
    for partial in (out / CHECKPOINTS).glob(".step_*"):
        shutil.rmtree(partial)
    notes: list[str] = []
    folders = _folders(out)
    for folder in reversed(folders):
        try:
            read_manifest(folder, kind="checkpoint")
            problems = verify_artefact(folder)
            if not problems:
                return SavedState(folder, _read_state(folder)), notes
            notes.append(f"checkpoint {folder} is damaged and ignored ({problems[0]})")
        except CheckpointError as error:
            notes.append(f"checkpoint {folder} is damaged and ignored ({error})")
    if folders:
        raise CheckpointError(
            f"{out}: no checkpoint is complete; remove the folder to train from the start",
            problems=[Problem(str(out), note) for note in notes],
        )
    return None, notes


def restore(saved: SavedState, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor] | None:
    """Restore weights and optimiser state from a checkpoint; return the best weights, if any."""
    tensors = load_tensors(saved.folder / WEIGHTS)
    _copy_weights(model, saved.folder / WEIGHTS, tensors)
    optimizer_state = load_tensors(saved.folder / _OPTIMIZER)
    for name, parameter in model.named_parameters():
        found = {
            key.partition("/")[0]: value for key, value in optimizer_state.items() if key.partition("/")[2] == name
        }
        for kind, value in found.items():
            if kind != "step":
                optimizer.state[parameter][kind] = sharded_like(value, parameter)
            else:
                # Only a fused optimiser wants its step count on the device.
                is_fused = optimizer.defaults.get("fused")
                optimizer.state[parameter][kind] = value.to(parameter.device) if is_fused else value
    if saved.state.best_step < 0:
        return None
    return tensors if saved.state.best_step == saved.state.step else load_tensors(saved.folder / _BEST)


def _copy_weights(model: nn.Module, path: Path, tensors: Mapping[str, Tensor]) -> None:
    names = model.state_dict()
    if names.keys() != tensors.keys():
        load_weights(model, path)
    with torch.no_grad():
        for name, value in names.items():
            value.copy_(sharded_like(tensors[name], value))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimiser's state, keyed by its kind and parameter."""
    return {
        f"{kind}/{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state[parameter].items()
    }


def identity_of(experiment: Experiment, store_fingerprint: str) -> dict[str, Any]:
    """Return the settings that a resumed run must share: all except the length of the training."""
    config = experiment.as_json()
    features = {key: value for key, value in config["features"].items() if key != "path"}
    if experiment.features.path is not None:
        features["file"] = hash_file(experiment.features.path)
    return {"store": store_fingerprint, "features": features, "model": config["model"], **training_identity(experiment)}


def training_identity(experiment: Experiment) -> dict[str, Any]:
    """Return the settings of [loss] and [train] that decide the weights after a step."""
    config = experiment.as_json()
    train = {key: value for key, value in config["train"].items() if key not in _FREE_KEYS}
    batch_dropout = train["batch_dropout"] if experiment.model.batch_embedding else 0.0
    return {"loss": config["loss"], "train": {**train, "batch_dropout": batch_dropout}}


def identity_problems(begun: Mapping[str, Any], asked: Mapping[str, Any], *, place: str = "") -> list[Problem]:
    """Return every key whose value differs from the one that the run was started with."""
    problems = []
    free = _FREE_KEYS if place == "train" else frozenset()
    for key in sorted((begun.keys() | asked.keys()) - free):
        name = f"{place}.{key}" if place else key
        before, now = begun.get(key), asked.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            problems += identity_problems(before, now, place=name)
        elif before != now:
            problems.append(Problem(name, f"the run was begun with {before!r}, got {now!r}"))
    return problems


class MetricsLog:
    """metrics.jsonl: a line for each step and each validation."""

    def __init__(self, path: Path, state: TrainState) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        with atomic_file(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines if _is_before(line, state)), "utf-8")
        self._stream: TextIO = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Append a line."""
        self._stream.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _is_before(line: str, state: TrainState) -> bool:
    try:
        entry = json.loads(line)
        return bool(entry["step"] <= (state.validated if entry["kind"] == "val" else state.step))
    except (json.JSONDecodeError, KeyError, TypeError):
        # A line that a kill cut short.
        return False


def _read_state(folder: Path) -> TrainState:
    raw = read_json(folder / _STATE)
    try:
        infinite = {name: float("inf") for name in ("best_loss", "best_value") if raw[name] is None}
        return TrainState(**{**raw, **infinite})
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / _STATE}: not of this version of pertcast ({error})") from None


def require_same_run(out: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a folder that holds something else, or a run with different settings."""
    if not any_content(out):
        return
    if not (out / IDENTITY).is_file():
        raise DataError(f"{out}: it exists and holds no run; use another --out, or delete it first")
    begun = upgrade(read_json(out / IDENTITY))
    if "learn" in begun:  # the earlier name of adapt.trainable
        begun["trainable"] = begun.pop("learn")
    problems = identity_problems({name: begun.get(name) for name in identity}, identity)
    if problems:
        raise CheckpointError(
            f"{out}: contains a run with different settings. Use another --out, or delete the folder to start over.",
            problems=problems,
        )


def is_finished(out: Path, steps: int) -> bool:
    """Return whether a folder holds a run that needs no more steps; refuse one that has taken more."""
    if not (out / MANIFEST).is_file():
        return False
    metrics = open_run(out).metrics
    if metrics["last_step"] > steps:
        raise CheckpointError(
            f"{out}: it is trained for {metrics['last_step']:,} steps already, and train.steps is {steps:,}; "
            "raise train.steps, or use another --out"
        )
    return bool(metrics["last_step"] == steps or metrics["stopped_early"])


def begin_run(out: Path, identity: dict[str, Any], features: PertFeatures, base: Baseline | None) -> None:
    """Write what a run starts from, and remove the results of an earlier, shorter run."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, RUN_JSON, MANIFEST, IDENTITY, METRICS):
        remove_leftovers(out / name)
    write_json(out / IDENTITY, identity)
    if not (out / FEATURES / "features.json").is_file():
        save_features(features, out / FEATURES)
    if base is not None:
        save_baseline(base, out / BASE)
