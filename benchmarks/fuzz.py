"""Fuzzes what reads files of others, guided by coverage: archives, and the structure of h5ad files.

Whatever bytes come, nothing but a PertcastError may come out, no file may appear outside the output folder, and no
input may take longer than thirty seconds. Needs atheris, which is no dependency of the project.

    python benchmarks/fuzz.py archive --seconds 300 --corpus corpus/archive
    python benchmarks/fuzz.py structure --seconds 300 --corpus corpus/structure
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SEEDS = Path(__file__).resolve().parents[1] / "tests" / "corpus"
_MAX_BYTES = 40_000
# HDF5 itself believes the sizes that a file declares; past this it fails to allocate them, and says so
_MEMORY_BYTES = 3 << 30

__all__ = ["TARGETS"]


def _try_archive(content: bytes) -> None:
    """Unpack an archive of these bytes; nothing but the h5ad may be written."""
    from pertcast.errors import PertcastError
    from pertcast.submission.pack import unpack

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.vcc").write_bytes(content)
        (folder / "out").mkdir()
        with contextlib.suppress(PertcastError):
            unpack(folder / "a.vcc", folder / "out" / "b.h5ad")
        left = {str(path.relative_to(folder)) for path in folder.rglob("*")} - {"a.vcc", "out"}
        left -= {"out/b.h5ad", "out/b.h5ad.manifest.json"}
        if left:
            raise AssertionError(f"files that should not be there: {left}")


def _try_h5ad(content: bytes) -> None:
    """Read an h5ad file of these bytes; HDF5 itself is fuzzed along, and known to loop on some of them."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.h5ad"
        path.write_bytes(content)
        _read_h5ad(path)


def _read_h5ad(path: Path) -> None:
    """Open an h5ad file and read all that a check reads."""
    from pertcast.errors import PertcastError
    from pertcast.files.h5ad import open_h5ad

    with contextlib.suppress(PertcastError), open_h5ad(path) as reader:
        for column in reader.obs_columns:
            reader.obs(column)
        reader.obs_names()
        # as large as a file of these bytes may truly be
        if reader.num_stored <= 1_000_000:
            for _, block in reader.chunks(max_values=1000):
                block.sum()


class _Bytes:
    """Turns an input into choices, one after another; zeros when it is used up."""

    def __init__(self, content: bytes) -> None:
        self._content, self._done = content, 0

    def take(self, number: int) -> bytes:
        part = self._content[self._done : self._done + number]
        self._done += number
        return part.ljust(number, b"\0")

    def below(self, limit: int) -> int:
        return self.take(1)[0] % limit

    def one_of(self, choices: Sequence[Any]) -> Any:
        return choices[self.below(len(choices))]


def _write_hostile(path: Path, given: _Bytes) -> None:
    """Write a well-formed HDF5 file whose arrays, types and attributes are what the input says."""
    import h5py
    import numpy as np

    kinds = ("<f4", "<f8", "<i4", "<i8", "<u2", "<u8", "i1", "?", "<f2", ">i4", "S3", "<c8")
    names = ("data", "indices", "indptr", "_index", "codes", "categories", "target_gene", "shape")

    def array(*, usual: str) -> Any:
        kind = np.dtype(usual if given.below(4) else given.one_of(kinds))
        length = given.below(12)
        values = np.frombuffer(given.take(length * kind.itemsize), dtype=kind)
        if given.below(2) and kind.kind in "iu":
            values = np.sort(np.abs(values) % 8)
        return values.reshape(1, -1) if not given.below(12) else values

    def options(values: Any) -> dict[str, Any]:
        chunked = values.ndim == 1 and len(values) and not given.below(3)
        return {"chunks": (1 + given.below(4),), "maxshape": (None,)} if chunked else {}

    def table(group: Any) -> None:
        group.attrs["_index"] = given.one_of(("_index", "_index", "_index", "nothing", 3))
        words = [b"", b"A", b"B", b"C", b"A", b"\xff"]
        for name in ("_index", "target_gene"):
            if given.below(6):
                group.create_dataset(name, data=np.array([given.one_of(words) for _ in range(given.below(8))], "S1"))
        if not given.below(4):
            node = group.create_group("more")
            node.attrs["encoding-type"] = given.one_of(("categorical", "nullable-integer", "odd"))
            for name in ("codes", "categories", "values", "mask"):
                node.create_dataset(name, data=array(usual="i1"))

    with h5py.File(path, "w", libver="latest") as file:
        if given.below(5):
            group = file.create_group("X")
            group.attrs["encoding-type"] = given.one_of(("csr_matrix", "csr_matrix", "csc_matrix", "array", b"csr"))
            shape = [int(number) for number in np.frombuffer(given.take(2), np.int8)]
            group.attrs["shape"] = np.array(shape if not given.below(4) else [given.below(8), given.below(8)])
            for name in names[:3]:
                if given.below(12):
                    values = array(usual="<f4" if name == "data" else "<i4")
                    group.create_dataset(name, data=values, **options(values))
        else:
            values = array(usual="<f4")
            file.create_dataset("X", data=values.reshape(-1, 1 + given.below(2)) if values.size % 2 == 0 else values)
        for name in ("obs", "var"):
            table(file.create_group(name)) if given.below(12) else file.create_dataset(name, data=array(usual="<f4"))


def _try_structure(content: bytes) -> None:
    """Read a well-formed HDF5 file with the structure that these bytes choose."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.h5ad"
        _write_hostile(path, _Bytes(content))
        _read_h5ad(path)


TARGETS: dict[str, Callable[[bytes], None]] = {"archive": _try_archive, "h5ad": _try_h5ad, "structure": _try_structure}


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, required=True, help="new inputs that reach new code come here")
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    atheris = importlib.import_module("atheris")

    given.corpus.mkdir(parents=True, exist_ok=True)
    for path in sorted((SEEDS / given.target).glob("*")):
        shutil.copy(path, given.corpus)
    with atheris.instrument_imports(include=["pertcast", "tarfile"]):
        import pertcast.submission.pack  # noqa: F401
    options = [f"-max_total_time={given.seconds}", f"-max_len={_MAX_BYTES}", f"-seed={given.seed}", "-timeout=30"]
    artifacts = f"-artifact_prefix={given.corpus}/crash-"
    arguments = [sys.argv[0], *options, "-rss_limit_mb=4096", "-print_final_stats=1", artifacts, str(given.corpus)]
    atheris.Setup(arguments, TARGETS[given.target])
    atheris.Fuzz()


if __name__ == "__main__":
    _main()
