"""Make the features of an experiment: read or fit them, and fill in missing ones only as the settings ask."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pertcast.config import FeaturesConfig
from pertcast.data.features.coexpression import FeatureStore, coexpression_loadings, gene_correlations, train_controls
from pertcast.data.features.readers import read_vectors
from pertcast.data.features.table import PertFeatures
from pertcast.data.split import Split
from pertcast.errors import DataError, Problem
from pertcast.files.labels import is_control_name
from pertcast.files.obs import near_misses

Vector = NDArray[np.float32]


def genes_of(label: str, separator: str, *, control: str = "", known: Container[str] = ()) -> tuple[str, ...]:
    """Return the genes that a label names, in order.

    >>> genes_of("KLF1+MAP2K6", "+"), genes_of("KLF1+ctrl", "+", control="ctrl")
    (('KLF1', 'MAP2K6'), ('KLF1',))
    """
    parts = tuple(part.strip() for part in label.split(separator) if part.strip())
    if len(parts) < 2 or not control:
        return parts
    return tuple(part for part in parts if part != control and (part in known or not is_control_name(part, control)))


def label_indicators(
    labels: Sequence[str], trained: Sequence[str], *, separator: str, control: str = ""
) -> dict[str, Vector]:
    """Return which genes each label names, among those that training labels name.

    >>> found = label_indicators(["A", "A+X", "X"], ["A", "B+C"], separator="+")
    >>> {label: vector.tolist() for label, vector in found.items()}
    {'A': [1.0, 0.0, 0.0], 'A+X': [1.0, 0.0, 0.0]}
    """
    columns = sorted({gene for label in trained for gene in genes_of(label, separator, control=control)})
    place = {gene: number for number, gene in enumerate(columns)}
    found = {}
    for label in labels:
        known = [place[gene] for gene in genes_of(label, separator, control=control) if gene in place]
        if known:
            found[label] = np.zeros(len(columns), dtype=np.float32)
            found[label][known] = 1
    return found


def combine_genes(
    vectors: Mapping[str, NDArray[np.floating]],
    labels: Sequence[str],
    *,
    how: Literal["none", "sum", "mean"],
    separator: str,
    control: str = "",
) -> dict[str, Vector]:
    """Return vectors of multi-gene labels, combined from those of their genes.

    >>> vectors = {"A": np.array([1.0]), "B": np.array([3.0])}
    >>> found = combine_genes(vectors, ["A+B", "A+X", "A+ctrl"], how="mean", separator="+", control="ctrl")
    >>> {label: v.tolist() for label, v in found.items()}
    {'A+B': [2.0], 'A+ctrl': [1.0]}
    """
    found = {}
    for label in labels:
        genes = genes_of(label, separator, control=control, known=vectors)
        if label in vectors or not genes or not all(gene in vectors for gene in genes):
            continue
        if len(genes) == 1 or how != "none":
            stacked = np.stack([vectors[gene] for gene in genes]).astype(np.float64)
            found[label] = (stacked.mean(axis=0) if how == "mean" else stacked.sum(axis=0)).astype(np.float32)
    return found


Vectors = dict[str, NDArray[np.float32]]


def load_features(config: FeaturesConfig, store: FeatureStore, *, targets: Sequence[str] = ()) -> PertFeatures:
    """Return features of the control, the store's perturbations and `targets`."""
    trained = [store.perts[code] for code in np.unique(store.pert_codes[(store.split & Split.TRAIN) != 0])]
    wanted = tuple(dict.fromkeys((store.control, *store.perts, *targets)))
    how: Any = {"how": config.combine, "separator": config.separator, "control": store.control}
    zero: set[str] = set()
    found: Mapping[str, NDArray[np.floating]] = {}
    if config.kind == "onehot":
        labels = tuple(dict.fromkeys((store.control, *trained)))
        own: Vectors = dict(zip(labels, np.eye(len(labels), dtype=np.float32), strict=True))
        source = f"one-hot of {len(labels)} training labels"
    elif config.kind == "labels":
        others = [name for name in trained if name != store.control]
        asked = [name for name in wanted if name != store.control]
        own = label_indicators(asked, others, separator=config.separator, control=store.control)
        width = len(next(iter(own.values()))) if own else 0
        own[store.control] = np.zeros(width, dtype=np.float32)
        source = f"indicators of the {width} genes that training labels name"
    elif config.kind == "coexpression":
        own, source = _coexpression(store, config.num_loadings)
        wanted = tuple(dict.fromkeys((*wanted, *own)))
        own |= combine_genes(own, wanted, **how)
    else:
        assert config.path is not None
        found = read_vectors(config.path)
        width = len(next(iter(found.values())))
        # an all-zero vector in a file means that it is unknown
        zero = {name for name, vector in found.items() if not vector.any() and name != store.control}
        found = {name: vector for name, vector in found.items() if name not in zero}
        own = {name: found[name].astype(np.float32) for name in wanted if name in found}
        own |= combine_genes(found, [name for name in wanted if name != store.control], **how)
        source = f"{config.path.name} ({len(found):,} names x {width:,})"
        own.setdefault(store.control, np.zeros(width, dtype=np.float32))

    missing = [name for name in wanted if name not in own]
    filled: dict[str, str] = {}
    if missing:
        known = [name for name in trained if name in own and name != store.control]
        if config.missing == "error" and config.kind == "file":
            raise _without_features(config, missing, zero=zero, names=found)
        own, filled = _fill(config, store, own=own, known=known, missing=missing)
    return PertFeatures(
        names=wanted,
        matrix=np.stack([own[name] for name in wanted]),
        kind=config.kind,
        control=store.control,
        source=source,
        filled=filled,
    )


def _without_features(
    config: FeaturesConfig, missing: Sequence[str], *, zero: set[str], names: Mapping[str, object]
) -> DataError:
    """Return the error that lists every label without a feature, with similar names in the file."""
    problems = []
    for label in missing:
        near = near_misses(label, list(names), num=1)
        message, remedy = "it has no feature", f"add it to {config.path}"
        if label in zero:
            message = "its vector is all zeros, which says that the file does not know it"
        elif near:
            remedy = f"did you mean {near[0]!r}? Give both the same name, or {remedy}"
        problems.append(Problem(repr(label), message, remedy))
    return DataError(
        f"{len(missing)} target(s) without a feature in {config.path}; or fill them in by name, counted in every "
        'report: features.missing = "mean" or "nearest"',
        problems=problems,
    )


def _coexpression(store: FeatureStore, num_loadings: int) -> tuple[Vectors, str]:
    rows, available = train_controls(store)
    loadings, varies = coexpression_loadings(store, rows, num_loadings=num_loadings)
    own = {gene: loading for gene, loading, kept in zip(store.genes, loadings, varies, strict=True) if kept}
    own[store.control] = np.zeros(num_loadings, dtype=np.float32)
    cells = f"{len(rows):,}" if len(rows) == available else f"{len(rows):,} of {available:,}"
    return own, f"{num_loadings} co-expression loadings among {cells} training control cells"


def _fill(
    config: FeaturesConfig, store: FeatureStore, *, own: Vectors, known: Sequence[str], missing: Sequence[str]
) -> tuple[Vectors, dict[str, str]]:
    """Return the features with missing ones filled in, and how each was filled."""
    if config.missing == "error":
        remedy = {
            "onehot": 'use features.kind = "coexpression" or "file"',
            "coexpression": "it is no gene of the list that training controls express",
            "labels": "no training label names a gene of it",
        }[config.kind]
        raise DataError(
            f"{len(missing)} target(s) without a {config.kind} feature; or fill them in by name, counted in every "
            'report: features.missing = "mean" or "nearest"',
            problems=[Problem(repr(name), "it has no feature", remedy) for name in missing],
        )
    if not known:
        raise DataError(
            f'features.missing = "{config.missing}": no training perturbation has a feature to fill '
            f"{len(missing)} target(s) from; give features that cover training perturbations"
        )
    if config.missing == "mean":
        mean: NDArray[np.float32] = np.stack([own[name] for name in known]).mean(axis=0, dtype=np.float64).astype("f4")
        return own | dict.fromkeys(missing, mean), dict.fromkeys(missing, f"mean of {len(known)} training targets")
    nearest = _nearest(store, known=known, missing=missing)
    return (
        own | {name: own[other] for name, (other, _) in nearest.items()},
        {name: f"feature of {other} (r = {r:.2f})" for name, (other, r) in nearest.items()},
    )


def _nearest(store: FeatureStore, *, known: Sequence[str], missing: Sequence[str]) -> dict[str, tuple[str, float]]:
    """Return, for each missing target, the covered one whose gene correlates most with its own."""
    position = {gene: place for place, gene in enumerate(store.genes)}
    candidates = [name for name in known if name in position]
    asked = [name for name in missing if name in position]
    rows, _ = train_controls(store)
    correlations = gene_correlations(
        store,
        rows,
        genes=np.array([position[name] for name in asked], dtype=np.int64),
        others=np.array([position[name] for name in candidates], dtype=np.int64),
    )
    best = {
        name: (candidates[int(np.nanargmax(row))], float(np.nanmax(row)))
        for name, row in zip(asked, correlations, strict=True)
        if np.isfinite(row).any()
    }
    lost = [name for name in missing if name not in best]
    if lost:
        raise DataError(
            f'features.missing = "nearest": {len(lost)} target(s) have no nearest covered target',
            problems=[
                Problem(
                    repr(name),
                    "its gene does not vary among training controls"
                    if name in position
                    else "it is no gene of the gene list",
                    'give it a feature, or use features.missing = "mean"',
                )
                for name in lost
            ],
        )
    return best
