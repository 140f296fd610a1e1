"""Cells sorted by group and gene, so that statistics read contiguous values.

Legend of shapes: P groups (perturbations), G genes. A value that is not stored is 0, and none is negative.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from scipy import sparse

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _keep_cache_somewhere() -> None:
    """Let numba cache in a temporary folder if the package and the home folder are read-only."""
    package = Path(__file__).parent
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    if "NUMBA_CACHE_DIR" in os.environ or os.access(package, os.W_OK) or os.access(existing, os.W_OK):
        return
    user = os.getuid() if hasattr(os, "getuid") else 0
    numba.config.CACHE_DIR = str(Path(tempfile.gettempdir()) / f"pertcast-numba-{user}")  # type: ignore[attr-defined]


_keep_cache_somewhere()


def compiled(function: _Function) -> _Function:
    """Compile a function over arrays at its first call; it releases the interpreter."""
    return cast(_Function, numba.njit(nogil=True, cache=True)(function))


def _copy_block(_context: Any, to: Any, _first: Any, source: Any, _begin: Any, _number: Any) -> tuple[Any, Any]:
    """In compiled functions: ``to[first : first + number] = source[begin : begin + number]`` at the speed of memcpy.

    Both are contiguous and of one number type; nothing is checked.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointers = [
            builder.gep(context.make_array(kind)(context, builder, array).data, [place])
            for kind, array, place in zip(signature.args[:4:2], arguments[:4:2], arguments[1:4:2], strict=True)
        ]
        item = context.get_abi_sizeof(context.get_data_type(signature.args[0].dtype))
        cgutils.raw_memcpy(builder, pointers[0], pointers[1], arguments[4], item)  # type: ignore[no-untyped-call]
        return context.get_dummy_value()

    return types.void(to, types.intp, source, types.intp, types.intp), generate


copy_block = cast(Callable[..., None], intrinsic(_copy_block))


class CellGroups(NamedTuple):
    """The values of groups of cells, gene by gene."""

    # Stored values of all groups, (n,), none of them 0; those of a group and gene lie together, in cell order
    values: NDArray[np.floating]
    # (P, G + 1) int64: gene ``g`` of group ``p`` has ``values[starts[p, g]:starts[p, g + 1]]``
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]  # (P,) int64, cells of each group

    def select(self, groups: Sequence[int] | NDArray[np.int64]) -> CellGroups:
        """Return some of the groups; the values are shared."""
        return CellGroups(self.values, self.starts[groups], self.sizes[groups])


@compiled
def _count(indptr: Any, indices: Any, values: Any, codes: Any, counts: Any) -> None:
    for row in range(len(indptr) - 1):
        group = codes[row]
        if group >= 0:
            for entry in range(indptr[row], indptr[row + 1]):
                if values[entry] != 0:
                    counts[group, indices[entry]] += 1


@compiled
def _place(
    indptr: Any, indices: Any, values: Any, codes: Any, cursor: Any, placed: Any, first_gene: int, last_gene: int
) -> None:
    for row in range(len(indptr) - 1):
        group = codes[row]
        if group < 0:
            continue
        low, high = indptr[row], indptr[row + 1]
        while low < high:  # the row's first entry of these genes
            middle = (low + high) // 2
            if indices[middle] < first_gene:
                low = middle + 1
            else:
                high = middle
        for entry in range(low, indptr[row + 1]):
            gene = indices[entry]
            if gene >= last_gene:
                break
            if values[entry] != 0:
                placed[cursor[group, gene]] = values[entry]
                cursor[group, gene] += 1


@compiled
def _means(values: Any, starts: Any, sizes: Any, scales: Any, exact: Any, rounded: Any) -> None:
    for group in range(starts.shape[0]):
        for gene in range(starts.shape[1] - 1):
            total = 0.0
            for entry in range(starts[group, gene], starts[group, gene + 1]):
                total += values[entry]
                rounded[group, gene] += values[entry] * scales[group]  # in this precision and order, as pdex adds
            exact[group, gene] = total / max(sizes[group], 1)


def parallel_over_genes(work: Callable[[int, int], None], num_genes: int, threads: int, bands_per_thread: int) -> None:
    """Call `work` on ranges ``[first, last)`` of genes in threads."""
    num_bands = max(1, min(num_genes, threads * bands_per_thread if threads > 1 else 1))
    bounds = np.linspace(0, num_genes, num_bands + 1).astype(np.int64).tolist()
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        for done in [pool.submit(work, *band) for band in itertools.pairwise(bounds)]:
            done.result()


def group_cells(
    log1p: sparse.csr_matrix | sparse.csc_matrix | sparse.coo_matrix | NDArray[np.floating], codes: NDArray[np.int64]
) -> CellGroups:
    """Return the values of a matrix of cells, (n, G), dense or sparse of any layout, by group and gene."""
    block = sparse.csr_matrix(log1p)
    if not block.has_canonical_format:
        block = block.copy()
        block.sum_duplicates()
    if block.nnz and not block.data.min() >= 0:
        raise ValueError("expected values that are not negative and not NaN")
    if codes.shape != (block.shape[0],):
        raise ValueError(f"expected one code for each of {block.shape[0]} cells, got {codes.shape}")
    codes = codes.astype(np.int64)
    num_groups = int(codes.max(initial=-1)) + 1
    counts = np.zeros((num_groups, block.shape[1]), dtype=np.int64)
    count_entries(block, codes, counts)
    starts = entry_starts(counts)
    values = np.empty(int(counts.sum()), dtype=block.dtype if block.dtype.kind == "f" else np.float64)
    place_entries(block, codes, cursor=starts[:, :-1].copy(), values=values)
    return CellGroups(values, starts, np.bincount(codes[codes >= 0], minlength=num_groups).astype(np.int64))


def entry_starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the start of each group's and gene's entries, (P, G + 1), from their numbers, (P, G)."""
    stops = np.cumsum(counts.ravel()).reshape(counts.shape)
    starts = np.empty((counts.shape[0], counts.shape[1] + 1), dtype=np.int64)
    starts[:, 1:] = stops
    starts[:, 0] = stops[:, 0] - counts[:, 0]
    return starts


def count_entries(block: sparse.csr_matrix, codes: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
    """Add the number of nonzero values of each group and gene in a block to `counts`."""
    _count(block.indptr, block.indices, block.data, codes, counts)


def place_entries(
    block: sparse.csr_matrix,
    codes: NDArray[np.int64],
    *,
    cursor: NDArray[np.int64],
    values: NDArray[np.floating],
    threads: int = 1,
) -> None:
    """Copy a block's values to their places; blocks follow each other in the order of cells."""
    arrays = block.indptr, block.indices, block.data, codes, cursor, values
    parallel_over_genes(lambda first, last: _place(*arrays, first, last), block.shape[1], threads, 1)


def group_means(groups: CellGroups, *, from_dense: bool = False) -> tuple[NDArray[np.float64], NDArray[np.floating]]:
    """Return the mean of each group and gene, exact and as pdex rounds it."""
    shape = groups.starts.shape[0], groups.starts.shape[1] - 1
    exact, rounded = np.zeros(shape), np.zeros(shape, dtype=groups.values.dtype)
    sizes = np.maximum(groups.sizes, 1)
    scales = (np.ones(len(sizes)) if from_dense else 1.0 / sizes).astype(rounded.dtype)
    _means(groups.values, groups.starts, groups.sizes, scales, exact, rounded)
    return exact, (rounded / sizes[:, None]).astype(rounded.dtype) if from_dense else rounded
