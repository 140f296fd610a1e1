"""Choose the control cells that are copied into a prediction, in proportion to batches and without repetition."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pertcast.errors import SubmissionError
from pertcast.stats.draws import generator


def proportional_counts(sizes: NDArray[np.int64], *, num: int) -> NDArray[np.int64]:
    """Return the number to take of each group, in proportion to its size, by largest remainders.

    >>> proportional_counts(np.array([6, 3, 1]), num=5).tolist()
    [3, 2, 0]
    """
    counts, remainders = np.divmod(sizes.astype(np.int64) * num, max(int(sizes.sum()), 1))
    short = num - int(counts.sum())
    counts[np.argsort(-remainders, kind="stable")[:short]] += 1
    return counts


def choose_controls(
    rows: NDArray[np.integer], batch_codes: NDArray[np.integer], *, num: int, seed: int
) -> NDArray[np.int64]:
    """Choose control cells without replacement, stratified by batch.

    >>> choose_controls(np.arange(10), np.repeat([0, 1], 5), num=10, seed=0).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    if len(rows) != len(batch_codes):
        raise ValueError(f"expected one batch code for each of {len(rows)} rows, got {len(batch_codes)}")
    if not 0 <= num <= len(rows):
        raise SubmissionError(
            f"controls: {num} control cells asked for, {len(rows)} are available to copy; "
            f"ask for at most {len(rows)} (submission.num_controls), "
            'or predict them (submission.controls = "predicted")'
        )
    order = np.argsort(rows, kind="stable")
    rows, batch_codes = np.asarray(rows, dtype=np.int64)[order], np.asarray(batch_codes)[order]
    batches, sizes = np.unique(batch_codes, return_counts=True)
    chosen = [
        generator(seed, "controls", int(batch)).permutation(rows[batch_codes == batch])[:count]
        for batch, count in zip(batches, proportional_counts(sizes, num=num), strict=True)
    ]
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)
