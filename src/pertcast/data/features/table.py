"""The table of perturbation features: one float32 vector for each label, saved with the run.

Invariants: labels are unique, vectors finite. A label without a feature is an error. Filled-in features are listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pertcast.data.features.coexpression import FeatureStore
from pertcast.data.split import Split
from pertcast.errors import CheckpointError, DataError, Problem
from pertcast.files.artefacts import atomic_file, read_json, write_json
from pertcast.files.obs import near_misses

_MATRIX, _FACTS = "features.safetensors", "features.json"


@dataclass(frozen=True)
class PertFeatures:
    """Features of perturbations."""

    names: tuple[str, ...]  # (P,) labels, the control among them
    matrix: NDArray[np.float32]  # (P, F) float32
    kind: str  # ``onehot``, ``coexpression``, ``labels`` or ``file``; ``none`` where nothing looks at features
    control: str  # The control label
    source: str  # Where they are from, in words
    filled: dict[str, str] = field(default_factory=dict)  # Label → how its missing feature was filled in

    @property
    def dim(self) -> int:
        """F, the width of a feature."""
        return int(self.matrix.shape[1])

    def of(self, labels: Sequence[str]) -> NDArray[np.float32]:
        """Return (N, F) float32 features of labels, in order."""
        place = {name: row for row, name in enumerate(self.names)}
        unknown = [label for label in dict.fromkeys(labels) if label not in place]
        if unknown:
            raise DataError(
                f"{len(unknown)} label(s) without a perturbation feature ({self.source})",
                problems=[Problem(repr(label), "it has no feature", _near(label, self.names)) for label in unknown],
            )
        rows = np.fromiter((place[label] for label in labels), dtype=np.int64, count=len(labels))
        return self.matrix[rows]


def _near(label: str, names: Sequence[str]) -> str:
    near = near_misses(label, names)
    return (
        f"did you mean {near[0]!r}?"
        if near
        else "give features that have it, or load them again with it among the targets"
    )


class CoverageRow(NamedTuple):
    """How many labels of a group have their own feature, have one filled in, and exist."""

    group: str
    covered: int
    filled: int
    total: int


def coverage(features: PertFeatures, store: FeatureStore, targets: Sequence[str]) -> list[CoverageRow]:
    """Return the coverage of training perturbations, held-out ones and targets, as rows of a table."""
    trained = np.unique(store.pert_codes[(store.split & Split.TRAIN) != 0])
    others = np.setdiff1d(np.unique(store.pert_codes[store.split != 0]), trained)
    groups = {
        "training perturbations": [store.perts[code] for code in trained],
        "held-out perturbations": [store.perts[code] for code in others],
        "targets": list(dict.fromkeys(targets)),
    }
    known = set(features.names)
    rows = []
    for group, labels in groups.items():
        some = [label for label in labels if label != features.control]
        filled = sum(label in features.filled for label in some)
        rows.append(CoverageRow(group, sum(label in known for label in some) - filled, filled, len(some)))
    return rows


def save_features(features: PertFeatures, folder: Path) -> None:
    """Write features.safetensors and features.json into a folder, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / _MATRIX) as temporary:
        save_file({"features": np.ascontiguousarray(features.matrix)}, temporary)
    facts = {name: getattr(features, name) for name in ("names", "kind", "control", "source", "filled")}
    write_json(folder / _FACTS, facts)


def open_features(folder: Path) -> PertFeatures:
    """Read what :func:`save_features` wrote."""
    facts = read_json(folder / _FACTS)
    path = folder / _MATRIX
    try:
        matrix = load_file(path)["features"]
        features = PertFeatures(matrix=matrix, **{**facts, "names": tuple(facts["names"])})
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; train the run again") from None
    except (SafetensorError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no features of pertcast ({error}); train the run again") from None
    if matrix.ndim != 2 or len(features.names) != len(matrix):
        raise CheckpointError(
            f"{path}: expected {len(features.names)} rows, as {_FACTS} names, got {matrix.shape}; train the run again"
        )
    return features
