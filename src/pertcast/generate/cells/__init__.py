"""Make cells from a prediction and real control cells, in log1p or whole counts."""

from pertcast.generate.cells.counts_head import draw_counts
from pertcast.generate.cells.make import CellMaker, cap_totals, dense_to_csr, round_to_counts
from pertcast.generate.cells.reweight import Donors, reweight
from pertcast.generate.cells.shift import shift, shift_sparing_zeros

__all__ = [
    "CellMaker",
    "Donors",
    "cap_totals",
    "dense_to_csr",
    "draw_counts",
    "reweight",
    "round_to_counts",
    "shift",
    "shift_sparing_zeros",
]
