"""Room on the disk: asked for before work starts, and a full disk said in one clear sentence."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from pertcast.errors import DataError

__all__ = ["describe_write_error", "require_space", "size_text"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_SLACK_BYTES = 1 << 20


def size_text(size: float) -> str:
    """Return a number of bytes for people.

    Examples
    --------
    >>> size_text(3_712_000_000), size_text(20_500)
    ('3.7 GB', '20.5 kB')
    """
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _folder_of(destination: Path) -> Path:
    folder = destination.absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def require_space(destination: Path, needed: int, *, what: str) -> None:
    """Make sure that a disk has room for what is to be written.

    Parameters
    ----------
    destination
        What is to be written there; its folder need not be there yet.
    needed
        Bytes, as far as they can be told.
    what
        Names what is written, for the message.

    Raises
    ------
    DataError
        If there is less.
    """
    free = shutil.disk_usage(_folder_of(destination)).free
    if needed + _SLACK_BYTES > free:
        raise DataError(
            f"{destination}: {what} needs about {size_text(needed)}, and its disk has {size_text(free)} free; "
            "make room, or give another --out"
        )


def describe_write_error(destination: Path, error: Exception) -> str:
    """Return what to tell a user whose output could not be written; HDF5 does not always say that the disk is full."""
    full = getattr(error, "errno", None) in _FULL or "no space left" in str(error).lower()
    if not full:
        try:
            full = shutil.disk_usage(_folder_of(destination)).free < _SLACK_BYTES
        except OSError:
            full = False
    why = "the disk is full" if full else str(error).partition("\n")[0]
    return f"{destination}: cannot be written ({why}); make room, or give another --out; nothing there was changed"
