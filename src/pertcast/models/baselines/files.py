"""A fitted baseline beside a network: arrays in safetensors, the rest in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pertcast.errors import CheckpointError
from pertcast.files.artefacts import atomic_file, read_json, write_json
from pertcast.models.baselines.predict import Baseline, BaselineSpec, Choice

__all__ = ["arrays_of", "open_arrays", "open_baseline", "read_spec", "save_baseline"]

_ARRAYS, _FACTS = "base.safetensors", "base.json"


def arrays_of(baseline: Baseline) -> dict[str, NDArray[Any]]:
    """Return the arrays of a baseline by name."""
    return {name: np.ascontiguousarray(getattr(baseline, name)) for name in baseline.spec.shapes()}


def read_spec(raw: Mapping[str, Any]) -> BaselineSpec:
    """Return a specification that was written as JSON."""
    choice = raw["choice"]
    return BaselineSpec(**{**raw, "choice": Choice(**choice) if isinstance(choice, Mapping) else Choice(*choice)})


def save_baseline(baseline: Baseline, folder: Path) -> None:
    """Write base.safetensors and base.json into a folder, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / _ARRAYS) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(arrays_of(baseline), temporary)
        temporary.chmod(mode)
    write_json(folder / _FACTS, baseline.spec.as_json())


def open_baseline(folder: Path) -> Baseline:
    """Read what :func:`save_baseline` wrote.

    Raises
    ------
    CheckpointError
        If a file is not there, is broken, or the two do not belong together.
    """
    try:
        spec = read_spec(read_json(folder / _FACTS))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / _FACTS}: no baseline of pertcast ({error}); train the run again") from None
    return open_arrays(folder / _ARRAYS, spec)


def open_arrays(path: Path, spec: BaselineSpec) -> Baseline:
    """Read the arrays of a baseline from a safetensors file.

    Raises
    ------
    CheckpointError
        If it is not there, is broken, or holds other arrays.
    """
    try:
        arrays = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; train the run again") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: no readable safetensors file ({error}); train the run again") from None
    if {name: tuple(array.shape) for name, array in arrays.items()} != spec.shapes():
        raise CheckpointError(f"{path}: its arrays are not those of a {spec.kind} baseline; train the run again")
    return Baseline(spec, **{name: arrays[name] for name in spec.shapes()})
