"""The manifest of a season's bundle of lists and control cells (contexts, panel), and ``meta.json``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pertcast.errors import DataError
from pertcast.files.artefacts import package_version
from pertcast.files.season_lists import read_targets
from pertcast.seasons import Season

_MANIFEST = "manifest.json"
_MAX_BYTES = 256 * 1024


@dataclass(frozen=True)
class Bundle:
    """The content of a bundle's manifest."""

    path: Path  # The manifest
    contexts: tuple[str, ...]  # Contexts of the phase that the bundle is for
    panel_id: str | None = None  # Name of its panel of targets, or ``None``


def read_bundle(*lists: Path | None) -> Bundle | None:
    """Return the bundle whose ``manifest.json`` lies beside one of the lists, or ``None``.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "manifest.json").write_text('{"contexts": ["D", "E", "F"], "panel_id": "final"}')
    >>> read_bundle(folder / "pert_counts.csv").contexts
    ('D', 'E', 'F')
    """
    for folder in dict.fromkeys(path.resolve().parent for path in lists if path is not None):
        path = folder / _MANIFEST
        raw = _read(path)
        if isinstance(raw, dict) and "contexts" in raw:
            contexts, panel_id = raw["contexts"], raw.get("panel_id")
            if not _are_names(contexts):
                raise DataError(
                    f"{path}, contexts: expected a list of different names, got {contexts!r}; "
                    "give the manifest of the season's bundle as it came, or remove it"
                )
            names = tuple(name.strip() for name in contexts)
            return Bundle(path, names, panel_id if isinstance(panel_id, str) and panel_id else None)
    return None


def _read(path: Path) -> object:
    try:
        if path.stat().st_size > _MAX_BYTES:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _are_names(value: object) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) and name.strip() for name in value):
        return False
    return len({name.strip() for name in value}) == len(value)


def contexts_in_force(season: Season, *lists: Path | None) -> tuple[Season, tuple[str, ...]]:
    """Return the season with the contexts of its lists' bundle, and a note if there is one."""
    bundle = read_bundle(*lists) if season.contexts is not None and "contexts" not in season.overridden else None
    if bundle is None:
        return season, ()
    note = f"contexts {', '.join(bundle.contexts)}, as {bundle.path} says"
    return dataclasses.replace(season, contexts=(bundle.contexts,)), (note,)


_SCHEMA = 1


def meta_json(season: Season, *, facts: Mapping[str, Any], targets: Path | None) -> bytes:
    """Return the content of ``meta.json``; equal facts and lists give equal bytes.

    >>> from pertcast.seasons import SEASONS
    >>> facts = {"cells": 1200, "genes": 18533, "stored_values": 9000, "contexts": ("A", "B", "C")}
    >>> json.loads(meta_json(SEASONS["vcc2026"], facts=facts, targets=None))["nnz"]
    9000
    """
    contexts = sorted(facts.get("contexts") or ())
    meta: dict[str, object] = {
        "schema": _SCHEMA,
        "nnz": int(facts["stored_values"]),
        "n_obs": int(facts["cells"]),
        "n_vars": int(facts["genes"]),
        "packer": f"pertcast {package_version('pertcast')}",
    }
    if contexts:
        meta["contexts"] = contexts
    if targets is not None:
        meta["perts_fingerprint"] = fingerprint(read_targets(targets, season))
        bundle = read_bundle(targets)
        if bundle is not None and bundle.panel_id is not None and set(bundle.contexts) == set(contexts):
            meta["panel_id"] = bundle.panel_id
    return json.dumps(meta, sort_keys=True).encode()


def fingerprint(targets: Iterable[str]) -> str:
    """Return the sha256 of a target list: unique names, sorted by code points, one per line, in UTF-8.

    >>> fingerprint(["MYC", "ACLY"]) == fingerprint(["ACLY", "MYC"])
    True
    """
    return f"sha256:{hashlib.sha256(chr(10).join(sorted(set(targets))).encode()).hexdigest()}"
