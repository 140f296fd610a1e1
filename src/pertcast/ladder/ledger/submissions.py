"""Packed submissions, with the checkpoint and settings that made each, from the manifests."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pertcast.config import rung_of
from pertcast.errors import CheckpointError, DataError, Problem
from pertcast.files.artefacts import MANIFEST, Manifest, Provenance, hash_file, manifest_path, read_manifest
from pertcast.ladder.ledger.scores import Record, read_records

ARCHIVE = ".vcc"
_BESIDE = f".{MANIFEST}"
_MAX_DEPTH = 8
_PASSED_OVER = frozenset({"node_modules", "__pycache__"})


@dataclass(frozen=True)
class Found:
    """The artefacts under some folders."""

    # Paths of archives, those too of which the manifest or the scores alone are left; sorted
    archives: tuple[Path, ...]
    # Kind (``prediction``, ``parts``, ``run``) → artefact and its manifest
    manifests: dict[str, list[tuple[Path, Manifest]]] = field(default_factory=dict)

    def by_file(self, kind: str, sha256: str) -> tuple[Path, Manifest] | None:
        """Return the artefact of a kind that has a file of this hash."""
        matching = (item for item in self.manifests.get(kind, ()) if sha256 in item[1].files.values())
        return next(matching, None)


def find_artefacts(places: Sequence[Path], *, depth: int = _MAX_DEPTH) -> Found:
    """Return the artefacts under some folders; an archive may be given itself."""
    missing = [place for place in places if not place.exists()]
    if missing:
        problems = [Problem(str(place), "no such file or folder", "give a folder or a .vcc file") for place in missing]
        raise DataError(problems=problems)
    archives: dict[Path, None] = {}
    manifests: dict[Path, tuple[str, Path]] = {}
    for place in places:
        if place.is_file():
            archives[place] = None
        for folder, files in _folders(place if place.is_dir() else place.parent, depth if place.is_dir() else 0):
            if place.is_dir():
                archives |= dict.fromkeys(folder / name for name in _archive_names(files))
            manifests |= {
                folder / name: (name, folder if name == MANIFEST else folder / name.removesuffix(_BESIDE))
                for name in files
                if name == MANIFEST or name.endswith(f".h5ad{_BESIDE}")
            }
    kinds: dict[str, list[tuple[Path, Manifest]]] = {}
    for _, artefact in manifests.values():
        try:
            manifest = read_manifest(artefact)
        except CheckpointError:
            continue  # an artefact that cannot be read made no archive that can be followed
        kinds.setdefault(manifest.kind, []).append((artefact, manifest))
    seen: dict[Path, Path] = {}
    for path in archives:
        seen.setdefault(path.resolve(), path)
    return Found(tuple(sorted(seen.values())), kinds)


def _archive_names(files: Sequence[str]) -> Iterator[str]:
    for name in files:
        base = name.removesuffix(_BESIDE).removesuffix(".scores.json")
        if base.endswith(ARCHIVE) and not base.startswith("."):
            yield base


def _folders(folder: Path, depth: int) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder with its file names, without entering artefacts."""
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except PermissionError:
        return
    files = [entry.name for entry in listed if entry.is_file()]
    yield folder, files
    if depth == 0 or MANIFEST in files:
        return
    for entry in listed:
        hidden = entry.name.startswith(".") or entry.name in _PASSED_OVER
        if not hidden and entry.is_dir(follow_symlinks=False):
            yield from _folders(folder / entry.name, depth - 1)


_WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Submission:
    """One packed submission."""

    archive: Path  # The ``.vcc``
    sha256: str  # Of its content; empty if neither the archive nor its manifest is there
    packed_at: str  # UTC, the archive's time on disk; manifests hold no times, so that equal inputs give equal bytes
    season: str  # Empty if no manifest says it
    # Checkpoint and configuration; ``None`` if they cannot be found (packed by another program)
    provenance: Provenance | None
    # The run's folder, found by the hash of its weights or as it was recorded, and whether it is there with
    # them
    run: Path | None = None
    run_is_there: bool = False
    records: tuple[Record, ...] = ()  # Scores of this content, oldest first
    # ``packed``; ``removed`` where the archive is gone and its manifest stays; ``replaced`` where only the
    # scores of this content are left, since something else was packed under its name
    state: str = "packed"
    inputs: dict[str, str] = field(default_factory=dict)  # Name → hash of what was packed: prediction, genes, targets

    @property
    def kind(self) -> str | None:
        """The kind of its model, or ``None`` if unknown."""
        model = self.provenance.experiment.get("model", {}) if self.provenance else None
        return None if model is None else str(model.get("kind", "state"))

    @property
    def rung(self) -> str | None:
        """The rung of its loss weights, ``other``, or ``None`` if unknown."""
        if self.provenance is None:
            return None
        return rung_of(self.provenance.experiment.get("loss", {})) if self.kind == "state" else "other"

    @property
    def scores(self) -> Record | None:
        """The latest record."""
        return self.records[-1] if self.records else None

    def snapshot(self) -> dict[str, Any]:
        """Return what a record keeps of the submission."""
        origin = asdict(self.provenance) if self.provenance else None
        return {"packed_at": self.packed_at, "season": self.season, "origin": origin, "inputs": self.inputs}


def read_submissions(found: Found) -> list[Submission]:
    """Return all submissions, oldest first."""
    submissions = [item for archive in found.archives for item in _of_archive(archive, found)]
    return sorted(submissions, key=lambda item: (item.packed_at, str(item.archive)))


def _of_archive(archive: Path, found: Found) -> list[Submission]:
    records = read_records(archive)
    manifest = _manifest(archive)
    current = []
    if manifest is not None or archive.is_file():
        sha256 = manifest.files.get(archive.name, "") if manifest else hash_file(archive)
        facts: Mapping[str, Any] = manifest.facts if manifest else {}
        path = archive if archive.is_file() else manifest_path(archive)
        submission = Submission(
            archive,
            sha256,
            packed_at=datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            season=str(manifest.config.get("season", "")) if manifest else "",
            provenance=Provenance.of_facts(facts) or (_follow(manifest, found) if manifest else None),
            records=tuple(record for record in records if record.archive_sha256 == sha256),
            state="packed" if archive.is_file() else "removed",
            inputs=manifest.inputs if manifest else {},
        )
        current = [_with_run(submission, found)]
    known = {item.sha256 for item in current}
    others = dict.fromkeys(record.archive_sha256 for record in records if record.archive_sha256 not in known)
    return [*(_with_run(_replaced(archive, sha256, records), found) for sha256 in others), *current]


def _manifest(archive: Path) -> Manifest | None:
    if not manifest_path(archive).is_file():
        return None
    try:
        return read_manifest(archive, kind="submission")
    except CheckpointError:
        return None


def _replaced(archive: Path, sha256: str, records: tuple[Record, ...]) -> Submission:
    """Return a submission of which only the scores are left."""
    ours = tuple(record for record in records if record.archive_sha256 == sha256)
    kept = ours[-1].submission
    return Submission(
        archive,
        sha256,
        packed_at=str(kept.get("packed_at") or ours[0].recorded_at),
        season=str(kept.get("season", "")),
        provenance=Provenance.of_facts(kept),
        records=ours,
        state="replaced",
        inputs=dict(kept.get("inputs", {})),
    )


def _follow(manifest: Manifest, found: Found) -> Provenance | None:
    """Follow hashes from an archive to its prediction, parts and run; ``None`` if one is gone."""
    prediction = found.by_file("prediction", manifest.inputs.get("prediction", ""))
    if prediction is None:
        return None
    if origin := Provenance.of_facts(prediction[1].facts):
        return origin
    wanted = prediction[1].inputs.items()
    matching = (parts for _, parts in found.manifests.get("parts", ()) if wanted <= parts.files.items())
    parts = next(matching, None)
    if parts is None or "weights" not in parts.inputs:
        return None
    weights = parts.inputs["weights"]
    run = found.by_file("run", weights)
    step = int(run[1].facts.get("step", -1)) if run else -1
    return Provenance(weights, str(run[0]) if run else "", step, parts.inputs.get("store", ""), parts.config)


def _with_run(submission: Submission, found: Found) -> Submission:
    """Return a submission with the current folder of its run, else the recorded one."""
    origin = submission.provenance
    if origin is None:
        return submission
    run = found.by_file("run", origin.weights)
    if run is None and origin.run and _has_weights(Path(origin.run), origin.weights):
        path, there = shortened(Path(origin.run)), True
    else:
        path, there = (run[0], True) if run else (Path(origin.run), False)
    return replace(submission, run=path, run_is_there=there)


def _has_weights(run: Path, sha256: str) -> bool:
    try:
        return read_manifest(run, kind="run").files.get(_WEIGHTS) == sha256
    except CheckpointError:
        return False


def shortened(path: Path) -> Path:
    """Return a path relative to the working folder if it is inside."""
    relative = Path(os.path.relpath(path))
    return path if relative.parts[:1] == ("..",) else relative
