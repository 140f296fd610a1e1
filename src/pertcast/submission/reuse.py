"""Whether a file is there, whole, and made from just these inputs, so that a stage need not make it again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pertcast.errors import CheckpointError
from pertcast.files.artefacts import read_manifest, verify_artefact

__all__ = ["is_current"]


def is_current(artefact: Path, *, kind: str, inputs: Mapping[str, str], config: Mapping[str, Any]) -> bool:
    """Return whether a file can stay as it is; without a readable manifest it cannot."""
    if not artefact.is_file():
        return False
    try:
        manifest = read_manifest(artefact, kind=kind)
    except CheckpointError:
        return False
    return manifest.matches(inputs=inputs, config=config) and not verify_artefact(artefact)
