"""A fitted baseline and its predictions, and its files.

An effect is mean log1p of perturbed cells minus mean log1p of the control cells of their context. All baselines are

    effect(context c, feature f) = mean_c + sum over examples j of  s(c, c_j) k(f, f_j) w_j

where s is 1 within a context and `sharing` between two: 0 keeps contexts apart, 1 pools them. Ridge has k = f . f_j /
scale, kernel ridge k = exp(-|f - f_j|^2 / 2 bandwidth^2). Nearest neighbours weigh w_j, deviations from the mean of
their context, by 1 / distance. Control copy and mean effect have no sum.

Shapes: N examples (a training perturbation in one context), C contexts, F width of a feature, G predicted genes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pertcast.errors import CheckpointError
from pertcast.files.artefacts import atomic_file, read_json, write_json

BaselineKind = Literal["control", "mean", "ridge", "kernel_ridge", "knn"]
Array = NDArray[np.float64]
_NEAREST = 1e-3


class Examples(NamedTuple):
    """The effects of training perturbations on which a baseline is fitted."""

    context_N: NDArray[np.int64]  # int64 codes below `num_contexts`
    feature_NF: NDArray[np.floating]  # Features of the perturbations
    effect_NG: NDArray[np.floating]  # Differences of mean log1p values
    num_contexts: int  # C; contexts without an example are allowed


class Choice(NamedTuple):
    """The choices of leave-one-out; 0 for those that a kind does not have."""

    penalty: float = 0.0  # Added to the kernel's diagonal, which is about 1
    bandwidth: float = 0.0  # Of the Gaussian kernel, in units of the features
    scale: float = 0.0  # What the products of features are divided by: their mean square over the examples
    neighbours: int = 0  # How many neighbours
    sharing: float = 0.0  # The similarity of two contexts
    error: float = 0.0  # The mean squared error of the left-out effects, over examples and genes


@dataclass(frozen=True)
class BaselineSpec:
    """Everything that decides the shapes of a baseline and what it computes; JSON-able."""

    kind: BaselineKind  # Which baseline
    num_genes: int  # G, F, C and N
    pert_dim: int
    num_contexts: int
    num_examples: int
    set_size: int  # How many control cells make a set in generation
    choice: Choice  # What leave-one-out chose

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values, choices by name."""
        return {**asdict(self), "choice": self.choice._asdict()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the arrays."""
        count = self.num_examples
        return {
            "mean_CG": (self.num_contexts + 1, self.num_genes),
            "context_N": (count,),
            "feature_NF": (count, self.pert_dim),
            "weight_NG": (count, self.num_genes),
        }


@dataclass(frozen=True, eq=False)
class Baseline:
    """A fitted baseline."""

    spec: BaselineSpec  # Shapes and choices
    # (C + 1, G) float32: what is the same for all perturbations of a context; the last row, the mean over the
    # contexts with examples, is for a context without any
    mean_CG: NDArray[np.float32]
    # int64 and float32: the examples and their weights; none for control copy and mean effect
    context_N: NDArray[np.int64]
    feature_NF: NDArray[np.float32]
    weight_NG: NDArray[np.float32]


def predict_effects(baseline: Baseline, feature_PF: NDArray[np.floating], *, context: int) -> NDArray[np.float32]:
    """Return the effects of perturbations in a context, (P, G) float32, in log1p units."""
    choice, kind = baseline.spec.choice, baseline.spec.kind
    effect_PG: Array = np.tile(baseline.mean_CG[context].astype(np.float64), (len(feature_PF), 1))
    if len(baseline.weight_NG):
        similar_N = np.where(baseline.context_N == context, 1.0, choice.sharing)
        known_NF, asked_PF = baseline.feature_NF.astype(np.float64), feature_PF.astype(np.float64)
        if kind == "knn":
            near_PN = neighbour_weights(distances(asked_PF, known_NF), similar_N > 0, count=choice.neighbours)
        else:
            near_PN = kernel(kind, asked_PF, known_NF, choice) * similar_N
        effect_PG += near_PN @ baseline.weight_NG.astype(np.float64)
    return effect_PG.astype(np.float32)


def kernel(kind: BaselineKind, one_PF: NDArray[np.floating], other_NF: NDArray[np.floating], choice: Choice) -> Array:
    """Return the similarity of features, (P, N)."""
    if kind == "ridge":
        return one_PF @ other_NF.T / choice.scale
    return np.exp(-0.5 * (distances(one_PF, other_NF) / choice.bandwidth) ** 2)


def distances(one_PF: NDArray[np.floating], other_NF: NDArray[np.floating]) -> Array:
    """Return Euclidean distances of features, (P, N); equal features are at exactly 0."""
    return np.stack([np.sqrt(((other_NF - one_F) ** 2).sum(axis=1)) for one_F in one_PF])


def neighbour_weights(distance_PN: Array, allowed_N: NDArray[np.bool_], *, count: int) -> Array:
    """Return weights of the `count` nearest allowed examples: 1 / distance, summing to 1; 0 if there is none."""
    weight_PN = np.zeros(distance_PN.shape)
    offered = np.flatnonzero(allowed_N)
    for row, distance_N in enumerate(distance_PN):
        nearest = offered[np.argsort(distance_N[offered], kind="stable")[:count]]
        typical = float(distance_N[offered].mean()) if len(offered) else 0.0
        closeness = 1 / (distance_N[nearest] + _NEAREST * typical) if typical else np.ones(len(nearest))
        weight_PN[row, nearest] = closeness / max(closeness.sum(), 1e-300)
    return weight_PN


_ARRAYS, _FACTS = "base.safetensors", "base.json"


def arrays_of(baseline: Baseline) -> dict[str, NDArray[Any]]:
    """Return the arrays of a baseline by name."""
    return {name: np.ascontiguousarray(getattr(baseline, name)) for name in baseline.spec.shapes()}


def read_spec(raw: Mapping[str, Any]) -> BaselineSpec:
    """Return a specification from JSON."""
    return BaselineSpec(**{**raw, "choice": Choice(**raw["choice"])})


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
    """Read what :func:`save_baseline` wrote."""
    try:
        spec = read_spec(read_json(folder / _FACTS))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / _FACTS}: no baseline of pertcast ({error}); train the run again") from None
    return open_arrays(folder / _ARRAYS, spec)


def open_arrays(path: Path, spec: BaselineSpec) -> Baseline:
    """Read the arrays of a baseline from a safetensors file."""
    try:
        arrays = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; train the run again") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: no readable safetensors file ({error}); train the run again") from None
    if {name: tuple(array.shape) for name, array in arrays.items()} != spec.shapes():
        raise CheckpointError(f"{path}: its arrays are not those of a {spec.kind} baseline; train the run again")
    return Baseline(spec, **{name: arrays[name] for name in spec.shapes()})
