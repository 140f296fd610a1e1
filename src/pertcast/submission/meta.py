"""The member ``meta.json`` of an archive: the shape, the contexts and the target list, for whoever takes the file.

Its keys and the fingerprint are those of the season's official packer, so that its tools read them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pertcast.files.artefacts import package_version
from pertcast.files.season_lists import read_targets
from pertcast.seasons import Season
from pertcast.submission.bundle import read_bundle

__all__ = ["fingerprint", "meta_json"]

_SCHEMA = 1


def meta_json(season: Season, *, facts: Mapping[str, Any], targets: Path | None) -> bytes:
    """Return the content of ``meta.json``; equal facts and lists give equal bytes.

    Parameters
    ----------
    season
        Its rules, to read the target list by.
    facts
        Of the h5ad that is packed: ``cells``, ``genes``, ``stored_values`` (explicit zeros counted) and ``contexts``.
    targets
        The target list that the prediction was checked against, or ``None``.

    Raises
    ------
    DataError
        If the target list cannot be read.

    Examples
    --------
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
    """Return the sha256 of a target list: of its names, each once, sorted by code points, one a line, in UTF-8.

    So it names the list, not the file: order, line ends and other columns do not count.

    Examples
    --------
    >>> fingerprint(["MYC", "ACLY"]) == fingerprint(["ACLY", "MYC"])
    True
    """
    return f"sha256:{hashlib.sha256(chr(10).join(sorted(set(targets))).encode()).hexdigest()}"
