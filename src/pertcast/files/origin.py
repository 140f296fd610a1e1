"""What cells were made by: the checkpoint and the configuration, told on from parts to prediction to archive.

Each artefact's manifest names its inputs by hash; this goes along in ``facts``, so that an archive still says which
checkpoint it came from when the folders between the two are gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pertcast.errors import CheckpointError
from pertcast.files.artefacts import manifest_path, read_manifest

__all__ = ["Origin", "manifest_origin", "origin_facts", "prediction_origin"]

_KEY = "origin"


@dataclass(frozen=True)
class Origin:
    """The checkpoint and the configuration that made some cells.

    Attributes
    ----------
    weights
        sha256 of the checkpoint's weights.
    run
        The run's folder when the cells were made, absolute.
    step
        The step that the weights are of.
    store
        Fingerprint of the store that control cells were taken from.
    experiment
        The resolved experiment: how the run was trained, how the cells were made and for what.
    """

    weights: str
    run: str
    step: int
    store: str
    experiment: dict[str, Any] = field(default_factory=dict)

    def as_facts(self) -> dict[str, Any]:
        """Return what goes into the facts of a manifest."""
        return {_KEY: asdict(self)}

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> Origin | None:
        """Return the origin that a manifest's facts tell; ``None`` where they tell none."""
        try:
            return cls(**facts[_KEY])
        except (KeyError, TypeError):
            return None


def origin_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what to tell on of the facts of what an artefact was made from; nothing where there is no origin.

    Examples
    --------
    >>> origin_facts({"cells": 3})
    {}
    """
    origin = Origin.of_facts(facts)
    return origin.as_facts() if origin else {}


def manifest_origin(prediction: Path) -> Origin | None:
    """Return the origin of a prediction as the manifest beside it tells it; ``None`` where there is none."""
    try:
        return Origin.of_facts(read_manifest(prediction, kind="prediction").facts)
    except CheckpointError:
        return None


def prediction_origin(prediction: Path, sha256: str) -> dict[str, Any]:
    """Return what to tell on of a prediction's origin; nothing where no manifest is of this content."""
    if not manifest_path(prediction).is_file():
        return {}
    try:
        manifest = read_manifest(prediction, kind="prediction")
    except CheckpointError:
        return {}
    return origin_facts(manifest.facts) if manifest.files.get(prediction.name) == sha256 else {}
