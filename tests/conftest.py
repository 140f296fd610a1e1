"""What all tests share: where the real data lies, and a builder of small h5ad files."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

Builder = Callable[..., Path]
PRECISION = os.environ.get("PERTCAST_TEST_PRECISION", "fp32")
"""What the tests' own experiments train in; "auto" would be another one on another processor."""
SMALL_GENES = tuple(f"G{number}" for number in range(20))


def pytest_configure() -> None:
    """Heed Ctrl-C, and let the programs that tests start heed it: what a script puts in the background ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; skips where it is not there."""
    folder = Path(os.environ.get("PERTCAST_SHARED", Path(__file__).parents[2] / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"the shared data folder {folder} is not here (set PERTCAST_SHARED)")
    return folder


def write_small_h5ad(
    path: Path,
    *,
    genes: Sequence[str] = SMALL_GENES,
    perts: Sequence[str] = ("non-targeting", "G1", "G2", "G3"),
    contexts: Sequence[str] = ("H1",),
    batches: Sequence[str] = ("b1", "b2"),
    cells_per_group: int = 12,
    layout: str = "csr",
    scale: str = "counts",
    seed: int = 0,
) -> Path:
    """Write Poisson counts (or their log1p) of every context x pert x batch group; G1..G3 lose their own gene."""
    rng = np.random.default_rng(seed)
    rows = [(c, p, b) for c in contexts for p in perts for b in batches for _cell in range(cells_per_group)]
    obs = pd.DataFrame(rows, columns=["cell_type", "target_gene", "batch"]).astype("category")
    obs.index = [f"cell{i}" for i in range(len(rows))]
    rate = np.tile(rng.gamma(2.0, 10.0, size=len(genes)), (len(rows), 1))
    for row, (_, pert, _) in enumerate(rows):
        if pert in genes:
            rate[row, list(genes).index(pert)] *= 0.1
    counts = rng.poisson(rate).astype(np.float32)
    if scale == "log1p":
        counts = np.log1p(counts * (1e4 / counts.sum(1, keepdims=True))).astype(np.float32)
    matrix = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.array}[layout](counts)  # type: ignore[operator]
    ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=list(genes))).write_h5ad(path)
    return path


@pytest.fixture
def small_h5ad(tmp_path: Path) -> Builder:
    """Return a builder of small h5ad files in the test's folder: ``small_h5ad(name="a.h5ad", layout="csc", ...)``."""

    def build(name: str = "small.h5ad", **options: object) -> Path:
        return write_small_h5ad(tmp_path / name, **options)  # type: ignore[arg-type]

    return build
