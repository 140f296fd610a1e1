"""One GPU kernel: gather stored rows, normalise and write them dense. It needs Triton, so it is imported late.

Annotations stay objects here, since Triton reads them.
"""

from typing import TYPE_CHECKING, Any

import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

if TYPE_CHECKING:
    from pertcast.data.device_cells import StoredCells

_BLOCK = 512


@triton.jit  # type: ignore[untyped-decorator]
def _gather(  # type: ignore[no-untyped-def]
    starts,
    columns,
    values,
    factors,
    positions,
    rows,
    out,
    num_genes,
    ARE_COUNTS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    COLUMN_MASK: tl.constexpr,
    VALUE_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the log1p values of one stored row into one row of `out`, which holds zeros."""
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + slot)
    first, last = tl.load(starts + row), tl.load(starts + row + 1)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        wanted = at < last
        column = tl.load(columns + at, mask=wanted, other=0).to(tl.int32) & COLUMN_MASK
        if HAS_POSITIONS:
            column = tl.load(positions + column, mask=wanted, other=-1).to(tl.int32)
            wanted = wanted & (column >= 0)
        value = tl.load(values + at, mask=wanted, other=0)
        if ARE_COUNTS:
            scaled = (value.to(tl.int32) & VALUE_MASK).to(tl.float32) * tl.load(factors + row)
            value = tl.log(1 + scaled)
        tl.store(out + slot * num_genes + column, value, mask=wanted)


def gather(cells: "StoredCells", rows_R: Tensor, dense_RG: Tensor, positions_G: Tensor | None) -> None:
    """Write log1p values of rows into `dense_RG`, which holds zeros."""
    masks: dict[str, Any] = {
        name: 0xFFFF if tensor.element_size() == 2 else 0x7FFFFFFF
        for name, tensor in (("COLUMN_MASK", cells.columns), ("VALUE_MASK", cells.values))
    }
    _gather[(len(rows_R),)](
        cells.starts,
        cells.columns,
        cells.values,
        cells.values if cells.factors is None else cells.factors,
        rows_R if positions_G is None else positions_G,
        rows_R,
        dense_RG,
        dense_RG.shape[1],
        ARE_COUNTS=cells.factors is not None,
        HAS_POSITIONS=positions_G is not None,
        BLOCK=_BLOCK,
        **masks,
    )
