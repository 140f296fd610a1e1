"""One writer at a time for an output: a lock file beside it, which the system lets go of when its owner dies.

Invariant: whoever holds the lock removes the file at the end; a file left by a dead run is taken over.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pertcast.errors import DataError
from pertcast.files.artefacts import manifest_path, remove_leftovers

if sys.platform != "win32":
    import fcntl

__all__ = ["claimed", "clean", "locked"]

logger = logging.getLogger(__name__)

_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def locked(destination: Path) -> Iterator[None]:
    """Keep other runs from writing `destination`, a file or a folder.

    Raises
    ------
    DataError
        If another run is writing it now.

    Examples
    --------
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
    """Lock an output, and remove what dead runs left beside and in it under temporary names; yield if one had.

    Raises
    ------
    DataError
        If another run is writing it now.
    """
    with locked(destination):
        yield clean(destination)


def clean(destination: Path) -> bool:
    """Remove what dead runs left beside and in an output under temporary names; return whether they left anything.

    Nobody may be writing the output.
    """
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
