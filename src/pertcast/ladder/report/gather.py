"""Find the material of a report from a folder, and read what stages wrote. No cells are read here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pertcast.errors import CheckpointError, DataError
from pertcast.files.artefacts import MANIFEST, Manifest, manifest_path, read_json, read_manifest
from pertcast.ladder.ledger.submissions import Found, find_artefacts

_DEPTH = 2


@dataclass(frozen=True)
class Material:
    """The material of a report; ``None`` or empty if missing."""

    place: Path  # The folder that was asked for
    run: Path | None = None  # Paths of artefacts
    parts: Path | None = None
    prediction: Path | None = None
    store: Path | None = None
    archive: Path | None = None
    run_manifest: Manifest | None = None  # The run's manifest: configuration, step, metrics, notes, versions
    run_facts: dict[str, Any] = field(default_factory=dict)  # ``run.json`` without its long lists
    metrics: tuple[dict[str, Any], ...] = ()  # The lines of ``metrics.jsonl``: ``kind``, ``step`` and each term
    plan: dict[str, Any] | None = None  # ``plan.json`` of the parts
    check: dict[str, Any] | None = None  # ``check.json``
    realism: Any = None  # ``realism.json`` beside the prediction

    @property
    def experiment(self) -> dict[str, Any]:
        """The resolved experiment of the run."""
        return self.run_manifest.config if self.run_manifest else {}


def gather(place: Path) -> Material:
    """Return the material in a folder of ``pertcast run``, or around a run's folder."""
    if place.is_file():
        place = place.parent
    if not place.is_dir():
        raise DataError(f"{place}: no such folder; give the folder of `pertcast run` or of a run")
    is_run = (place / MANIFEST).is_file() and _manifest(place, "run") is not None
    around = place.absolute().parent if is_run else place
    found = find_artefacts([around], depth=_DEPTH)
    run = place if is_run else _one(around, found, "run", "run")
    manifest = _manifest(run, "run") if run else None
    weights = manifest.files.get("weights.safetensors") if manifest else None
    parts = _one(around, found, "parts", "parts", inputs={"weights": weights} if weights else None)
    prediction = _one(around, found, "prediction", "prediction.h5ad", parts=parts)
    if is_run and parts is None:
        prediction = None  # of another run
    if run is None and prediction is None:
        raise DataError(
            f"{place}: neither a run nor a prediction is in it; give the folder of `pertcast run` or `train`"
        )
    beside = prediction.parent if prediction else place
    facts = read_json(run / "run.json") if run and (run / "run.json").is_file() else {}
    return Material(
        place,
        run=run,
        parts=parts,
        prediction=prediction,
        store=_store(run, facts, around),
        archive=_archive(found, prediction),
        run_manifest=manifest,
        run_facts=facts,
        metrics=tuple(_lines(run / "metrics.jsonl")) if run else (),
        plan=read_json(parts / "plan.json") if parts else None,
        check=_json(beside / "check.json"),
        realism=_json(beside / "realism.json"),
    )


def _manifest(artefact: Path, kind: str) -> Manifest | None:
    try:
        return read_manifest(artefact, kind=kind)
    except CheckpointError:
        return None


def _one(
    around: Path,
    found: Found,
    kind: str,
    usual: str,
    *,
    inputs: dict[str, str] | None = None,
    parts: Path | None = None,
) -> Path | None:
    """Return the artefact of a kind at its usual place, else the only one that fits the others."""
    there = [(path, manifest) for path, manifest in found.manifests.get(kind, ()) if path.exists()]
    if inputs is not None:
        there = [item for item in there if inputs.items() <= item[1].inputs.items()]
    if parts is not None and (made := _manifest(parts, "parts")) is not None:
        there = [item for item in there if item[1].inputs.items() <= made.files.items()]
    paths = [path for path, _ in there]
    if around / usual in paths:
        return around / usual
    return paths[0] if len(paths) == 1 else None


def _store(run: Path | None, facts: dict[str, Any], around: Path) -> Path | None:
    """Return the store of a run, at its recorded place or beside the run."""
    named = facts.get("store_path", {})
    places = [around / "store"]
    if run and named:
        places = [run / named["relative"], Path(named["absolute"]), *places]
    return next((path for path in places if _manifest(path, "store") is not None), None)


def _archive(found: Found, prediction: Path | None) -> Path | None:
    """Return the archive that was packed from a prediction."""
    made = _manifest(prediction, "prediction") if prediction else None
    for archive in found.archives:
        packed = _manifest(archive, "submission") if manifest_path(archive).is_file() else None
        if made and packed and packed.inputs.get("prediction") in made.files.values():
            return archive
    return None


def _json(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of metrics.jsonl, without a truncated last line."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise DataError(
                    f"{path}, line {number}: not JSON ({error}); train again, or correct the line"
                ) from None
