"""Name a file that is not what its name says: a Git LFS pointer, a web page, an archive."""

from __future__ import annotations

from pathlib import Path

__all__ = ["wrong_kind"]

_HEAD_BYTES = 512
_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"<!doctype html", "a web page; download the file itself"),
    (b"<html", "a web page; download the file itself"),
    (b"\x1f\x8b", "compressed by gzip; decompress it with gunzip"),
    (b"\xff\xfe", "UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; save it as UTF-8"),
    (b"\x89hdf\r\n", "an HDF5 file"),
    (b"pk\x03\x04", "a zip archive or an Excel workbook; save the table as CSV text"),
)


def wrong_kind(path: Path, *, zipped: bool = False) -> str | None:
    """Return what a file is, and what to do, if its first bytes are those of another kind; ``None`` otherwise.

    Parameters
    ----------
    path
        A file that should be HDF5, a table or a text.
    zipped
        Whether a zip archive is fine, as for .pt and .npz.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES).lstrip().lower()
    except OSError:
        return None
    kinds = _KINDS[:-1] if zipped else _KINDS
    return next((what for start, what in kinds if head.startswith(start)), None)
