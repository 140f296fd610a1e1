"""What generation needs to know of a training: the run, beside what its store says of genes, labels and scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pertcast.config import STORE_KEYS, Experiment
from pertcast.data.features import PertFeatures
from pertcast.data.store import Store
from pertcast.models.baselines import BaselineSpec
from pertcast.models.checkpoint import Run
from pertcast.models.spec import StateSpec
from pertcast.train.features import feature_facts

__all__ = ["run_of"]


def run_of(
    out: Path,
    spec: StateSpec | BaselineSpec,
    experiment: Experiment,
    store: Store,
    features: PertFeatures,
    *,
    output_genes: NDArray[np.int64],
    step: int,
    metrics: Mapping[str, Any],
    notes: Sequence[str],
) -> Run:
    """Return the record of what was trained on a store; nothing is written.

    Parameters
    ----------
    out
        The run's folder.
    spec
        The network, or the baseline.
    experiment, store, features
        What it was trained with.
    output_genes
        Positions of the predicted genes in the store, ascending.
    step, metrics, notes
        As :class:`pertcast.models.checkpoint.Run` has them.
    """
    return Run(
        path=out,
        spec=spec,
        # as the store was made: its files may be elsewhere by now
        experiment={**experiment.as_json(), **{key: store.config[key] for key in STORE_KEYS if "." not in key}},
        genes=store.genes,
        output_genes=output_genes,
        hvg=store.hvg,
        perts=store.perts,
        contexts=store.contexts,
        batches=store.batches,
        control=store.control,
        target_sum=store.target_sum,
        scale=store.scale,
        store_path=store.path,
        store_fingerprint=store.fingerprint,
        step=step,
        metrics=dict(metrics),
        features=feature_facts(features),
        notes=tuple(notes),
    )
