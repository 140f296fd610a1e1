"""Measures the training store: bytes a stored value, and the rates of preparing, opening and reading it.

    python -m benchmarks.store --cells cells.h5ad --out out/store [--copies 3]

`--copies` takes the same file several times over, to come nearer to a store that memory cannot hold. Cold reads are
from files whose pages the system has been asked to forget.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pertcast.config import load_experiment
from pertcast.data.prepare import prepare
from pertcast.data.store import Store
from pertcast.stats.draws import generator

__all__ = ["measure"]

_TOML = """
[datasets]
cells = "cells"
[training]
cells = "train"
[columns]
context = "H1"
batch = "batch"
"""
_SETS, _SET_SIZE = 40, 128


def measure(cells: Path, out: Path, *, copies: int = 1) -> dict[str, float]:
    """Return what was measured: bytes, values, seconds and cells a second, by name."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "cells").mkdir(parents=True)
    for number in range(copies):
        shutil.copyfile(cells, out / "cells" / f"part{number}.h5ad")
    (out / "experiment.toml").write_text(_TOML)
    experiment = load_experiment(out / "experiment.toml")
    prepare_seconds = _seconds(lambda: prepare(experiment, out / "store"))
    num_bytes = sum(path.stat().st_size for path in (out / "store").iterdir())
    open_seconds = _seconds(lambda: Store.open(out / "store"))
    store = Store.open(out / "store")
    values = float(np.load(out / "store" / "indptr.npy")[-1])
    rows = generator(0, "benchmark", "rows").integers(store.num_cells, size=(2, _SETS, _SET_SIZE))
    _forget(out / "store")
    cold = _seconds(lambda: [store.csr(sets) for sets in rows[0]])
    warm = _seconds(lambda: [store.csr(sets) for sets in rows[0]])
    dense = _seconds(lambda: [store.log1p(sets) for sets in rows[0]])
    num_read = _SETS * _SET_SIZE
    return {
        "cells": store.num_cells,
        "stored values": values,
        "values a cell": values / store.num_cells,
        "bytes a value": num_bytes / values,
        "prepare: cells/s": store.num_cells / prepare_seconds,
        "prepare: million values/s": values / prepare_seconds / 1e6,
        "open: seconds": open_seconds,
        "cold random sets, CSR: cells/s": num_read / cold,
        "warm random sets, CSR: cells/s": num_read / warm,
        "warm random sets, dense: cells/s": num_read / dense,
    }


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _forget(store: Path) -> None:
    """Ask the system to drop the pages of a store's files."""
    for path in store.glob("*.npy"):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=1)
    asked = parser.parse_args()
    for name, value in measure(asked.cells, asked.out, copies=asked.copies).items():
        print(f"{name:34} {value:14,.3f}")


if __name__ == "__main__":
    main()
