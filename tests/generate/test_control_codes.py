from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pertcast.generate.control_codes import ControlCodes

NUM_CELLS = 400


class Counted:
    """Codes of two numbers a cell, and a note of what was read and encoded."""

    def __init__(self, most_cells: int = NUM_CELLS) -> None:
        self.read_cells: list[int] = []
        self.sizes: set[int] = set()
        self.codes = ControlCodes(self.read, self.encode, width=2, num_cells=NUM_CELLS, most_bytes=8 * most_cells)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        self.read_cells += np.unique(rows).tolist()
        return rows[:, None].astype(np.float32)

    def encode(self, cells: NDArray[np.float32]) -> Tensor:
        self.sizes.add(len(cells))
        return torch.from_numpy(cells * [1, -1]).float()


@settings(deadline=None)
@given(passes=st.lists(st.lists(st.integers(0, NUM_CELLS - 1), max_size=300), max_size=5), most=st.integers(1, 500))
def test_codes_are_those_of_the_cells_whatever_is_kept(passes: list[list[int]], most: int) -> None:
    counted = Counted(most)
    for rows in passes:
        found = counted.codes.of(np.array(rows, dtype=np.int64))
        assert found.tolist() == [[row, -row] for row in rows]


def test_each_cell_is_read_once_and_as_many_at_a_time() -> None:
    counted = Counted()
    random = np.random.default_rng(0)
    for _ in range(20):
        counted.codes.of(random.integers(0, NUM_CELLS, 250))
    assert sorted(counted.read_cells) == list(range(NUM_CELLS))
    assert counted.sizes == {128}


def test_no_more_is_kept_than_asked_for() -> None:
    counted = Counted(most_cells=150)
    for start in (0, 100, 200, 0):
        counted.codes.of(np.arange(start, start + 100))
    assert len(counted.codes._kept) == 150
    assert len(counted.read_cells) == 400
