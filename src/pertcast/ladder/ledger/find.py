"""Finds archives and the manifests of what they came from, under some folders, at the cost of listing them.

Folders of stores, runs and parts are known by their manifest and not entered; hidden folders and links are passed over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pertcast.errors import CheckpointError, DataError, Problem
from pertcast.files.artefacts import MANIFEST, Manifest, read_manifest

__all__ = ["ARCHIVE", "Found", "find_artefacts"]

ARCHIVE = ".vcc"
_BESIDE = f".{MANIFEST}"
_MAX_DEPTH = 8
_PASSED_OVER = frozenset({"node_modules", "__pycache__"})


@dataclass(frozen=True)
class Found:
    """What lies under some folders.

    Attributes
    ----------
    archives
        Paths of archives, those too of which the manifest or the scores alone are left; sorted.
    manifests
        Kind (``prediction``, ``parts``, ``run``) → artefact and its manifest.
    """

    archives: tuple[Path, ...]
    manifests: dict[str, list[tuple[Path, Manifest]]] = field(default_factory=dict)

    def by_file(self, kind: str, sha256: str) -> tuple[Path, Manifest] | None:
        """Return the artefact of a kind that has a file of this hash."""
        matching = (item for item in self.manifests.get(kind, ()) if sha256 in item[1].files.values())
        return next(matching, None)


def find_artefacts(places: Sequence[Path], *, depth: int = _MAX_DEPTH) -> Found:
    """Return what lies under some folders; an archive may be named itself.

    Parameters
    ----------
    places
        Folders, or archives.
    depth
        How many levels of folders to enter.

    Raises
    ------
    DataError
        With every place that is not there.
    """
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
    return Found(tuple(_without_repeats(archives)), kinds)


def _archive_names(files: Sequence[str]) -> Iterator[str]:
    for name in files:
        base = name.removesuffix(_BESIDE).removesuffix(".scores.json")
        if base.endswith(ARCHIVE) and not base.startswith("."):
            yield base


def _folders(folder: Path, depth: int) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder with the names of its files; one that is an artefact is not entered."""
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


def _without_repeats(archives: dict[Path, None]) -> list[Path]:
    seen: dict[Path, Path] = {}
    for path in archives:
        seen.setdefault(path.resolve(), path)
    return sorted(seen.values())
