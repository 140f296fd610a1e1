"""Artefacts: manifests, hashes, atomic replacement, locks, provenance and reuse.

Invariants: a final name never has a half-written file. A manifest lists the hash of every file of its artefact, the
hashes of its inputs, the resolved settings and the versions. A folder is replaced as one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pertcast.errors import CheckpointError, DataError, Problem
from pertcast.files.resources import available_cpus

MANIFEST = "manifest.json"
_PARTIAL = ".partial-"
_MOST_AT_ONCE = 8
_HEAD_BYTES = 4096
GENERATOR = '<meta name="generator" content="pertcast">'
"""What tells a page of ours."""
_MADE_BY = '"made_by": "pertcast"'
_PACKAGES = ("pertcast", "numpy", "scipy", "anndata", "h5py", "torch")
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Manifest:
    """What an artefact is and what it was made from."""

    kind: str  # ``store``, ``run``, ``parts``, ``prediction`` or ``submission``
    # Name → sha256 of what it was made from (files, or other artefacts by the hash of their manifest)
    inputs: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # The resolved configuration of the stage, as JSON values
    # Relative path → sha256 of every file of the artefact but the manifest itself
    files: dict[str, str] = field(default_factory=dict)
    # What a later stage or a reader wants to know (counts, scale, target sum), as JSON values
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # Sentences that every report of this artefact repeats
    # Package → version
    versions: dict[str, str] = field(default_factory=lambda: {name: package_version(name) for name in _PACKAGES})

    def matches(self, *, inputs: Mapping[str, str], config: Mapping[str, Any]) -> bool:
        """Return whether the artefact was made from these inputs with these settings."""
        return dict(inputs) == self.inputs and _plain(config) == self.config


def package_version(name: str) -> str:
    """Return the version of a package, or "not installed": pertcast may run from its source folder."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _plain(value: Any) -> Any:
    """Return a value as it reads back from JSON."""
    return json.loads(json.dumps(value, default=str))


def timestamp() -> str:
    """Return the current time in UTC, to the second: ``2026-11-22T20:31:05Z``."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hash_files(paths: Sequence[Path]) -> Iterator[str]:
    """Yield the sha256 of each file, in order, reading several at once.

    >>> list(hash_files([]))
    []
    """
    with ThreadPoolExecutor(min(available_cpus(), _MOST_AT_ONCE), thread_name_prefix="pertcast-hash") as pool:
        yield from pool.map(hash_file, paths)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _partial_name(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}{_PARTIAL}{uuid.uuid4().hex[:8]}")


def remove_leftovers(destination: Path) -> list[Path]:
    """Remove the temporary files that dead runs left beside a destination, and return them."""
    removed = []
    if destination.parent.is_dir():
        for path in destination.parent.glob(f".{destination.name}{_PARTIAL}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            removed.append(path)
    return removed


@contextmanager
def atomic_file(destination: Path) -> Iterator[Path]:
    """Give a temporary name beside `destination`; sync and rename at the end, or remove it on failure.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with atomic_file(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = _partial_name(destination)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(destination)
        _sync(destination.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_dir(destination: Path) -> Iterator[Path]:
    """Give an empty temporary folder beside `destination` that replaces it at the end."""
    if destination.exists() and not (destination / MANIFEST).is_file() and any_content(destination):
        raise DataError(f"{destination}: it exists and is no pertcast artefact; give another --out, or remove it first")
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = _partial_name(destination)
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            _sync(path)
        old = _partial_name(destination)
        if destination.exists():
            destination.replace(old)
        temporary.replace(destination)
        _sync(destination.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_replaceable(path: Path, *, force: bool, interrupted: bool = False) -> None:
    """Refuse to replace a file that pertcast did not write, or that has changed since."""
    if path.is_dir():
        raise DataError(f"{path}: expected a file to write, got a folder; give a file name")
    if force or interrupted or not path.exists() or _is_ours(path):
        return
    what = "was changed since pertcast wrote it" if manifest_path(path).is_file() else "was not written by pertcast"
    raise DataError(f"{path}: it {what}; replace it with --force, or give another --out")


def _is_ours(path: Path) -> bool:
    if manifest_path(path).is_file():
        try:
            return read_manifest(path).files.get(path.name) == hash_file(path)
        except CheckpointError:
            return False
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    return GENERATOR.encode() in head or (path.suffix == ".json" and _MADE_BY.encode() in head)


def any_content(path: Path) -> bool:
    """Return whether a path is a file, or a folder that is not empty."""
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically with sorted keys, so that equal values give equal bytes."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True, default=str) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is this the folder that pertcast wrote?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); make the artefact again") from None


def manifest_path(artefact: Path) -> Path:
    """Return the path of an artefact's manifest: inside a folder, beside a file."""
    return artefact / MANIFEST if artefact.is_dir() else artefact.with_name(f"{artefact.name}.{MANIFEST}")


def write_manifest(artefact: Path, manifest: Manifest) -> None:
    """Write the manifest, with the hashes of all files unless it lists them already."""
    files = manifest.files or _hashes(artefact)
    write_json(manifest_path(artefact), {**asdict(manifest), "files": files})


def _hashes(artefact: Path) -> dict[str, str]:
    """Return the hash of every file of an artefact except its manifest."""
    base = artefact if artefact.is_dir() else artefact.parent
    within = sorted(artefact.rglob("*")) if artefact.is_dir() else [artefact]
    paths = [path for path in within if path.is_file() and path.name != MANIFEST]
    return {str(path.relative_to(base)): found for path, found in zip(paths, hash_files(paths), strict=True)}


def read_manifest(artefact: Path, *, kind: str | None = None) -> Manifest:
    """Read the manifest of an artefact."""
    path = manifest_path(artefact)
    if not artefact.exists() and not path.exists():
        what = f"a {kind}" if kind else "something that pertcast wrote"
        raise CheckpointError(f"{artefact}: it is not there; give the path of {what}")
    raw = read_json(path)
    try:
        manifest = Manifest(**{**raw, "notes": tuple(raw["notes"])})
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: not a manifest of pertcast ({error}); make the artefact again") from None
    if kind is not None and manifest.kind != kind:
        raise CheckpointError(f"{artefact}: expected a {kind}, got a {manifest.kind}; give the folder of a {kind}")
    return manifest


def verify_artefact(artefact: Path) -> list[Problem]:
    """Return every file of an artefact that is missing or differs from its manifest."""
    manifest = read_manifest(artefact)
    base = artefact if artefact.is_dir() else artefact.parent
    there = [name for name in manifest.files if (base / name).is_file()]
    found = dict(zip(there, hash_files([base / name for name in there]), strict=True))
    problems = []
    for name, expected in manifest.files.items():
        if name not in found:
            message = "listed in the manifest, but not there"
            problems.append(Problem(str(base / name), message, "make the artefact again"))
        elif found[name] != expected:
            message = "its content is not what the manifest says"
            problems.append(Problem(str(base / name), message, "make the artefact again"))
    return problems


if sys.platform != "win32":
    import fcntl


logger = logging.getLogger(__name__)

_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def locked(destination: Path) -> Iterator[None]:
    """Keep other processes from writing `destination`, a file or a folder.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with locked(folder / "a.txt"):
    ...     (folder / ".a.txt.lock").is_file()
    True
    >>> list(folder.iterdir())
    []
    """
    destination = destination.absolute()
    destination.parent.mkdir(parents=True, exist_ok=True)
    path = destination.with_name(f".{destination.name}.lock")
    if sys.platform == "win32":
        yield
        return
    descriptor = _take(path, destination)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def claimed(destination: Path) -> Iterator[bool]:
    """Lock an output and remove what dead runs left of it; yield whether there was anything."""
    with locked(destination):
        yield clean(destination)


def clean(destination: Path) -> bool:
    """Remove what dead runs left beside and in an output; return whether there was anything."""
    removed = [*remove_leftovers(destination), *remove_leftovers(manifest_path(destination))]
    if destination.is_dir():
        for path in {leftover.parent for leftover in destination.rglob(".*.partial-*")}:
            for name in {name.name[1:].rpartition(".partial-")[0] for name in path.glob(".*.partial-*")}:
                removed += remove_leftovers(path / name)
    return bool(removed)


def _take(path: Path, destination: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 20).decode(errors="replace").strip()
            os.close(descriptor)
            raise DataError(
                f"{destination}: another run (process {owner or 'unknown'}) is writing it; "
                "wait until it ends or stop it, or give another --out"
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(descriptor)
                raise
            logger.warning("%s: this file system has no locks; do not run two commands on one output", path.parent)
        # the last owner may have removed the file between our opening and locking it
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                return descriptor
        except FileNotFoundError:
            pass
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        os.close(descriptor)


_KEY = "origin"


@dataclass(frozen=True)
class Provenance:
    """The checkpoint and the settings that made some cells."""

    weights: str  # sha256 of the checkpoint's weights
    run: str  # The run's folder when the cells were made, absolute
    step: int  # The step that the weights are of
    store: str  # Fingerprint of the store that control cells were taken from
    # The resolved experiment: how the run was trained, how the cells were made and for what
    experiment: dict[str, Any] = field(default_factory=dict)

    def as_facts(self) -> dict[str, Any]:
        """Return the facts for a manifest."""
        return {_KEY: asdict(self)}

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> Provenance | None:
        """Return the provenance in a manifest's facts, or ``None``."""
        try:
            return cls(**facts[_KEY])
        except (KeyError, TypeError):
            return None


def origin_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the provenance to pass on from the facts of an input; empty if there is none.

    >>> origin_facts({"cells": 3})
    {}
    """
    origin = Provenance.of_facts(facts)
    return origin.as_facts() if origin else {}


def manifest_origin(prediction: Path) -> Provenance | None:
    """Return the provenance in the manifest beside a prediction, or ``None``."""
    try:
        return Provenance.of_facts(read_manifest(prediction, kind="prediction").facts)
    except CheckpointError:
        return None


def prediction_provenance(prediction: Path, sha256: str) -> dict[str, Any]:
    """Return the provenance to pass on from a prediction; empty if no manifest has this content."""
    if not manifest_path(prediction).is_file():
        return {}
    try:
        manifest = read_manifest(prediction, kind="prediction")
    except CheckpointError:
        return {}
    return origin_facts(manifest.facts) if manifest.files.get(prediction.name) == sha256 else {}


def is_current(artefact: Path, *, kind: str, inputs: Mapping[str, str], config: Mapping[str, Any]) -> bool:
    """Decide whether a file can be reused: it is complete and was made from the same inputs."""
    if not artefact.is_file():
        return False
    try:
        manifest = read_manifest(artefact, kind=kind)
    except CheckpointError:
        return False
    return manifest.matches(inputs=inputs, config=config) and not verify_artefact(artefact)
