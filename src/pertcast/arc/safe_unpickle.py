"""Unpickle tensors, NumPy scalars and plain containers without running code.

Invariant: only the names in the two lists below resolve, and only to functions of this file, to torch's own list for
``weights_only``, or to plain containers. Any other name is refused and reported.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._utils import _rebuild_tensor_v2

from pertcast.errors import READ_ERRORS, CheckpointError
from pertcast.files.artefacts import hash_file

_SCALAR_KINDS = frozenset("biufSU")
_REMEDY = "only tensors, numbers, names and plain containers are read; give the folder as `state tx train` wrote it"


class _Dtype:
    """A NumPy dtype of numbers or text, never of objects."""

    def __init__(self, code: str, *_flags: object) -> None:
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in _SCALAR_KINDS:
            raise pickle.UnpicklingError(f"numpy dtype {code!r}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if len(state) > 1 and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


def _scalar(dtype: _Dtype, content: bytes) -> object:
    if type(dtype) is not _Dtype or type(content) is not bytes or len(content) != dtype.dtype.itemsize:
        raise pickle.UnpicklingError("a NumPy scalar that is neither number nor text")
    return np.frombuffer(content, dtype=dtype.dtype)[0].item()


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Replace ``_codecs.encode``, which would run any registered codec."""
    if type(text) is not str or encoding != "latin1":
        raise pickle.UnpicklingError(f"_codecs.encode with the encoding {encoding!r}")
    return text.encode("latin1")


def _storage(content: bytes) -> Any:
    """Replace ``torch.storage._load_from_bytes``, which would unpickle anything."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


_SCALARS: dict[str, Any] = {
    "numpy.dtype": _Dtype,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.multiarray.scalar": _scalar,
    "_codecs.encode": _latin1,
}
_PICKLED: dict[str, Any] = {
    **_SCALARS,
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch.storage._load_from_bytes": _storage,
}


class _Unpickler(pickle.Unpickler):
    """Resolve only the names in `_PICKLED`."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement of a listed name."""
        full = f"{module}.{name}"
        if full not in _PICKLED:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {full}")
        return _PICKLED[full]


def read_pickle(path: Path) -> Any:
    """Read a ``.pkl`` file."""

    def read() -> Any:
        with path.open("rb") as stream:
            return _Unpickler(stream).load()

    return _guarded(path, read)


def read_tensors(path: Path) -> Any:
    """Read a ``.pt``, ``.torch`` or ``.ckpt`` file; its tensors are on the CPU and are read when they are used."""

    def read() -> Any:
        allowed: list[Any] = [(value, name) for name, value in _SCALARS.items()]
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickle protocols that torch writes less often
            # Most of a checkpoint is the optimiser's state; mapping avoids reading it.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))

    return _guarded(path, read)


def hash_contents(path: Path) -> str:
    """Return the sha256 of an archive's table of contents: each record's name, size and CRC-32."""
    if not zipfile.is_zipfile(path):
        return hash_file(path)
    with zipfile.ZipFile(path) as archive:
        lines = [f"{record.filename} {record.file_size} {record.CRC:08x}\n" for record in archive.infolist()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give a folder that `state tx train` wrote") from None
    except READ_ERRORS as error:
        text = str(error) or type(error).__name__
        if found := re.search(r"GLOBAL ([\w.]+)", text):
            raise CheckpointError(
                f"{path}: refused, for it names {found[1]}, and nothing of it was run; {_REMEDY}"
            ) from None
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        reason = next((line for line in lines if "Unpickler error: " in line), lines[0]).partition("error: ")
        raise CheckpointError(f"{path}: refused or damaged ({reason[2] or reason[0]}); {_REMEDY}") from None
