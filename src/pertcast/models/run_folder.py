"""A trained run as files: weights in safetensors, everything else in JSON; opening one runs no code.

A run is a network, perhaps with a baseline in the folder ``base``, or a baseline alone. Invariants: the manifest is
written last, so a folder with a manifest is complete. A run that opens has every tensor of its network, in the right
shapes, and the bytes that its manifest lists.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pertcast.errors import CheckpointError, Problem
from pertcast.files.artefacts import (
    MANIFEST,
    Manifest,
    atomic_file,
    hash_file,
    read_json,
    read_manifest,
    verify_artefact,
    write_json,
    write_manifest,
)
from pertcast.models.baselines import Baseline, BaselineSpec, open_baseline
from pertcast.models.baselines.predict import open_arrays, read_spec
from pertcast.models.heads import COUNTS_HEAD_PREFIX, DE_HEAD_PREFIX
from pertcast.models.spec import StateSpec
from pertcast.models.state import StateTransition

WEIGHTS = "weights.safetensors"
RUN_JSON = "run.json"
BASE = "base"
_REMEDY = "train again, or give the folder of another run"
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Run:
    """A trained network or fitted baseline, with everything that generation needs."""

    path: Path  # The folder
    spec: StateSpec | BaselineSpec  # The network, or the baseline
    experiment: dict[str, Any]  # The resolved experiment that it was trained with, as JSON values
    genes: tuple[str, ...]  # Genes of the training store, in order
    output_genes: NDArray[np.int64]  # (predicted genes,) int64 positions in `genes`, ascending
    # (highly variable genes,) int64 positions in `genes`: what the network reads where ``model.input`` is
    # "hvg", and in its order what an imported network reads
    hvg: NDArray[np.int64]
    perts: tuple[str, ...]  # Names of the codes that the network was trained with
    contexts: tuple[str, ...]
    batches: tuple[str, ...]
    control: str  # The control label
    # The total that cells were normalised to before log1p; ``None`` if the data came as log1p
    target_sum: float | None
    # The scale of the store's own values: ``counts`` or ``log1p``. The network reads and predicts log1p
    # always
    scale: str
    store_path: Path  # The store that it was trained on; the fingerprint is empty if the run was imported
    store_fingerprint: str
    step: int  # The step that the weights are of
    # ``last_step``, ``val_loss`` (``None`` without validation), ``num_parameters`` and the like
    metrics: dict[str, Any] = field(default_factory=dict)
    # What the perturbation features are: kind, source, width, how many were filled in
    features: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # Sentences that every report of this run repeats

    @property
    def network(self) -> StateSpec:
        """The network."""
        if isinstance(self.spec, BaselineSpec):
            raise CheckpointError(
                f'{self.path}: expected a run of a network, got the baseline "{self.spec.kind}"; '
                'train one with model.kind = "state"'
            )
        return self.spec

    def model(self, *, counts_head: bool = False) -> StateTransition:
        """Return the network with its weights, on the CPU, in evaluation mode."""
        with torch.device("meta"):
            model = StateTransition(self.network)
            if counts_head:
                model.add_counts_head()
        load_weights(model, self.path / WEIGHTS)
        return model.eval()

    def baseline(self) -> Baseline | None:
        """Return the baseline of this run or of its network; ``None`` if there is none."""
        if isinstance(self.spec, BaselineSpec):
            return open_arrays(self.path / WEIGHTS, self.spec)
        stands_on_one = self.experiment["model"].get("base", "none") != "none"
        return open_baseline(self.path / BASE) if stands_on_one else None


def save_run(run: Run, weights: Mapping[str, Tensor], *, inputs: Mapping[str, str]) -> None:
    """Write a run into its folder, the manifest last; checkpoints and metrics are untouched."""
    folder = run.path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    save_tensors(folder / WEIGHTS, weights)
    store = run.store_path.absolute()
    write_json(
        folder / RUN_JSON,
        {
            **{item.name: getattr(run, item.name) for item in fields(run) if item.name not in ("path", "store_path")},
            "spec": run.spec.as_json() if isinstance(run.spec, BaselineSpec) else asdict(run.spec),
            "output_genes": run.output_genes.tolist(),
            "hvg": run.hvg.tolist(),
            "store_path": {"relative": os.path.relpath(store, folder.absolute()), "absolute": str(store)},
        },
    )
    kept = [
        folder / WEIGHTS,
        folder / RUN_JSON,
        *sorted((folder / "features").rglob("*")),
        *sorted((folder / BASE).rglob("*")),
    ]
    files = {str(path.relative_to(folder)): hash_file(path) for path in kept if path.is_file()}
    facts = {"step": run.step, "metrics": run.metrics}
    manifest = Manifest("run", inputs=dict(inputs), config=run.experiment, files=files, facts=facts, notes=run.notes)
    write_manifest(folder, manifest)


def open_run(path: Path) -> Run:
    """Open a run and check its manifest, hashes, JSON, and the names and shapes of its tensors."""
    read_manifest(path, kind="run")
    if problems := verify_artefact(path):
        raise CheckpointError(f"{path}: the run is incomplete; {_REMEDY}", problems=problems)
    raw = read_json(path / RUN_JSON)
    try:
        run = _from_json(path, raw)
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path / RUN_JSON}: not a run of this version of pertcast ({error}); {_REMEDY}"
        ) from None
    if isinstance(run.spec, BaselineSpec):
        expected = run.spec.shapes()
    else:
        with torch.device("meta"):
            expected = {name: tuple(value.shape) for name, value in StateTransition(run.spec).state_dict().items()}
    require_shapes(path / WEIGHTS, _without_heads(_shapes(path / WEIGHTS)), expected)
    return run


def _from_json(path: Path, raw: Mapping[str, Any]) -> Run:
    store = raw["store_path"]
    beside = Path(os.path.normpath(path.absolute() / store["relative"]))
    plain = {item.name: raw[item.name] for item in fields(Run) if item.name not in ("path", "store_path")}
    return Run(
        **{
            **plain,
            **{name: tuple(plain[name]) for name in ("genes", "perts", "contexts", "batches", "notes")},
            **{name: np.asarray(plain[name], dtype=np.int64) for name in ("output_genes", "hvg")},
            "path": path,
            "spec": _spec(plain["spec"]),
            # A run that was moved together with its store finds it again.
            "store_path": beside if beside.is_dir() else Path(store["absolute"]),
        }
    )


def _spec(raw: Mapping[str, Any]) -> StateSpec | BaselineSpec:
    values: dict[str, Any] = dict(raw)
    if "kind" in values:
        return read_spec(values)
    return StateSpec(**{**values, "decoder_widths": tuple(values["decoder_widths"])})


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically; equal tensors give equal bytes."""
    whole = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    with atomic_file(path) as temporary:
        # safetensors makes files that only their owner may read; a run is as readable as any other file.
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(whole, temporary)
        temporary.chmod(mode)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file."""
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Read a network's weights, ignoring heads that it does not have."""
    tensors = load_tensors(path)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tensors = _without_heads(tensors, but=expected)
    require_shapes(path, {name: tuple(value.shape) for name, value in tensors.items()}, expected)
    model.load_state_dict(tensors, assign=True)


def _without_heads(tensors: Mapping[str, _Value], *, but: Collection[str] = ()) -> dict[str, _Value]:
    """Return the tensors without those of the two heads, unless `but` has some of the head's."""
    dropped = tuple(
        prefix for prefix in (DE_HEAD_PREFIX, COUNTS_HEAD_PREFIX) if not any(name.startswith(prefix) for name in but)
    )
    return {name: value for name, value in tensors.items() if not name.startswith(dropped)}


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the tensors' shapes from the file's header alone."""
    try:
        with safe_open(path, framework="pt") as stream:
            return {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path}: no such file; {_REMEDY}")
    return CheckpointError(f"{path}: not a readable safetensors file ({error}); {_REMEDY}")


def require_shapes(path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Require that a file's tensors are those that a network expects."""
    problems = []
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            problems.append(Problem(f"tensor {name}", f"expected shape {expected[name]}, got no such tensor"))
        elif name not in expected:
            problems.append(Problem(f"tensor {name}", f"the network has none of this name (shape {found[name]})"))
        elif found[name] != expected[name]:
            problems.append(Problem(f"tensor {name}", f"expected shape {expected[name]}, got {found[name]}"))
    if problems:
        raise CheckpointError(f"{path}: the weights are not this network's; {_REMEDY}", problems=problems)
