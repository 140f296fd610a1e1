"""Read a run folder of ``state tx train``: settings, names, perturbation vectors and weights.

Invariant: the result is plain: text, numbers and float tensors on the CPU. No code of the folder runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor

from pertcast.arc.safe_unpickle import read_pickle, read_tensors
from pertcast.errors import CheckpointError, Problem

_CHECKPOINT = "checkpoints/final.ckpt"
# names of the State Transition network in config.yaml; the last two are of earlier versions
_STATE = ("state", "pertsets", "neuralot")
_NESTED = ("transformer_backbone_kwargs", "lora")


@dataclass(frozen=True)
class ArcFolder:
    """The content of a run folder."""

    path: Path  # The folder, and the file that the weights are from
    checkpoint: Path
    data: dict[str, Any]  # The settings of its data, as config.yaml has them
    # The settings of its network: those that the checkpoint stores, and config.yaml's where it stores none
    options: dict[str, Any]
    # Names of the genes that it predicts, as var_dims.pkl has them; empty if it has none
    gene_names: tuple[str, ...]
    perts: dict[str, Tensor]  # Label → vector
    batches: tuple[str, ...]  # Names, in the order of their codes
    contexts: tuple[str, ...]
    weights: dict[str, Tensor]  # Name → tensor, as arc-state names them
    step: int  # The step that the weights are of
    is_early: bool = False  # Trained by arc-state before 0.9.32, where cells always attend to each other


def read_arc_folder(path: Path, *, checkpoint: Path | None = None) -> ArcFolder:
    """Read a run folder of arc-state."""
    chosen = checkpoint or path / _CHECKPOINT
    needed = (path / "config.yaml", path / "var_dims.pkl", path / "pert_onehot_map.pt", chosen)
    problems = [Problem(str(file), "no such file") for file in needed if not file.is_file()]
    if problems:
        there = ", ".join(sorted(file.name for file in path.glob("checkpoints/*.ckpt"))) or "none"
        raise CheckpointError(
            f"{path}: not a complete run folder of `state tx train` (checkpoints there: {there}); give such a "
            "folder, or name one of its checkpoints with --checkpoint",
            problems=problems,
        )
    config = _read_config(path / "config.yaml")
    _require_state(path, config["model"])
    dims = _mapping(path / "var_dims.pkl", read_pickle(path / "var_dims.pkl"))
    saved = _mapping(chosen, read_tensors(chosen))
    weights = _mapping(chosen, saved.get("state_dict"), "state_dict")
    wrong = [str(name) for name, value in weights.items() if not isinstance(value, Tensor)]
    if wrong:
        raise CheckpointError(f"{chosen}: expected tensors in state_dict, got something else as {', '.join(wrong[:5])}")
    own = _mapping(chosen, saved.get("hyper_parameters", {}), "hyper_parameters")
    stated = _mapping(path / "config.yaml", config["model"].get("kwargs") or {}, "model.kwargs")
    return ArcFolder(
        path=path,
        checkpoint=chosen,
        data=_mapping(path / "config.yaml", config["data"].get("kwargs") or {}, "data.kwargs"),
        options=_merge(stated, own),
        gene_names=_names(path / "var_dims.pkl", dims.get("gene_names")),
        perts=_vectors(path / "pert_onehot_map.pt", read_tensors(path / "pert_onehot_map.pt")),
        batches=_codes(path, "batch_onehot_map"),
        contexts=_codes(path, "cell_type_onehot_map"),
        weights={str(name): value.detach() for name, value in weights.items()},
        step=int(saved.get("global_step", 0)),
        is_early=_is_early(config.get("training")),
    )


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).replace("\n", " ")
        raise CheckpointError(f"{path}: refused or damaged, not plain YAML ({reason})") from None
    if not isinstance(config, dict) or not all(isinstance(config.get(part), dict) for part in ("data", "model")):
        raise CheckpointError(f"{path}: expected the sections `data` and `model`; is it of `state tx train`?")
    return config


def _require_state(path: Path, model: Mapping[str, Any]) -> None:
    name = model.get("name")
    if name is not None and str(name).lower() not in _STATE:
        message = f"expected a State Transition network (state), got {str(name)!r}: pertcast has no such network"
        remedy = "import a run that was trained with `state tx train model=state`"
        raise CheckpointError(problems=[Problem(f"{path / 'config.yaml'}, model.name", message, remedy)])


def _is_early(training: Any) -> bool:
    """Return whether the settings are from before 0.9.32; later versions always record gradient accumulation."""
    return isinstance(training, Mapping) and "max_steps" in training and "gradient_accumulation_steps" not in training


def _merge(stated: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the network's settings. The checkpoint's win, since arc-state changes some itself."""
    merged = {**stated, **own}
    for name in _NESTED:
        parts = [part for part in (stated.get(name), own.get(name)) if isinstance(part, Mapping)]
        if parts:
            merged[name] = {key: value for part in parts for key, value in part.items()}
    return merged


def _mapping(path: Path, value: Any, part: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        where = f" in {part}" if part else ""
        raise CheckpointError(f"{path}: expected a mapping{where}, got {type(value).__name__}")
    return {str(key): content for key, content in value.items()}


def _names(path: Path, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise CheckpointError(f"{path}: expected a list of gene names, got {type(value).__name__}")
    return tuple(str(name) for name in value)


def _vectors(path: Path, value: Any) -> dict[str, Tensor]:
    vectors = {}
    for label, vector in _mapping(path, value).items():
        if not isinstance(vector, Tensor) or vector.ndim != 1 or not torch.isfinite(vector).all():
            raise CheckpointError(f"{path}: expected one vector of finite numbers for {label!r}")
        vectors[label] = vector.float()
    if len({len(vector) for vector in vectors.values()}) != 1:
        raise CheckpointError(f"{path}: expected vectors of one width for all labels")
    return vectors


def _codes(path: Path, stem: str) -> tuple[str, ...]:
    """Return the names of a one-hot map in the order of their codes; empty without such a file."""
    for file, read in ((path / f"{stem}.torch", read_tensors), (path / f"{stem}.pkl", read_pickle)):
        if file.is_file():
            codes = {
                name: int(value.argmax()) if isinstance(value, Tensor) and value.ndim else int(value)
                for name, value in _mapping(file, read(file)).items()
            }
            if sorted(codes.values()) != list(range(len(codes))):
                raise CheckpointError(f"{file}: expected the codes 0 to {len(codes) - 1}, each once")
            return tuple(sorted(codes, key=codes.__getitem__))
    return ()
