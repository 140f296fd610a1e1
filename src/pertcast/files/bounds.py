"""What an HDF5 file may declare: sizes that a file of its length can hold, chunks that fit into memory.

HDF5 believes what a file declares and allocates it before it reads a byte. What is asked here costs no read; a damage
inside HDF5's own structures is not found by it (docs/strictness.md).
"""

from __future__ import annotations

from typing import Any

import h5py

__all__ = ["MAX_CHUNK_BYTES", "MAX_RATIO", "require_plausible"]

MAX_RATIO = 2_000
"""Bytes that a byte of the file may stand for; deflate's own limit is 1,032."""
MAX_CHUNK_BYTES = 1 << 30
"""Bytes of one chunk, which HDF5 reads as a whole."""
_ALWAYS_BYTES = 1 << 26


def require_plausible(node: Any) -> None:
    """Refuse a dataset whose declared size its file cannot hold, or whose chunks are too large to be read.

    Raises
    ------
    TypeError
        If it is no dataset.
    ValueError
        If it is larger than it can be.

    Examples
    --------
    >>> import io
    >>> with h5py.File(io.BytesIO(), "w") as file:
    ...     require_plausible(file.create_dataset("small", shape=(1000,), dtype="f4"))
    """
    if not isinstance(node, h5py.Dataset):
        raise TypeError(f"expected an array, got {type(node).__name__}")
    declared, file_bytes = int(node.size or 0) * node.dtype.itemsize, node.file.id.get_filesize()
    if declared > max(_ALWAYS_BYTES, MAX_RATIO * file_bytes):
        raise ValueError(f"it declares {int(node.size):,} values, more than a file of {file_bytes:,} bytes can hold")
    chunk_bytes = node.dtype.itemsize
    for length in node.chunks or ():
        chunk_bytes *= int(length)
    if node.chunks and chunk_bytes > MAX_CHUNK_BYTES:
        raise ValueError(f"chunks of {chunk_bytes:,} bytes; at most {MAX_CHUNK_BYTES:,} can be read")
