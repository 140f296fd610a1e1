"""Which control cells are copied into a prediction: batches in proportion, no cell twice, the same for the same seed.

Pure: rows and batch codes in, rows out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pertcast.errors import SubmissionError
from pertcast.stats.draws import generator

__all__ = ["choose_controls", "proportional_counts"]


def proportional_counts(sizes: NDArray[np.int64], *, num: int) -> NDArray[np.int64]:
    """Return how many to take of each group, in proportion to the groups' sizes, by largest remainders.

    Parameters
    ----------
    sizes
        (groups,) sizes of the groups; `num` is at most their sum.
    num
        How many to take in all; ties of remainders go to the earlier group.

    Examples
    --------
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
    """Choose control cells without replacement, stratified by batch in the batches' proportions.

    A batch's cells are put in an order keyed by the seed and the batch; those that are due are taken from its front.

    Parameters
    ----------
    rows
        (cells,) rows of the control cells there are.
    batch_codes
        (cells,) the batch of each of these rows; -1 for unknown, which counts as one more batch.
    num
        How many to choose.
    seed
        The experiment's seed.

    Returns
    -------
    (num,) int64, ascending.

    Raises
    ------
    SubmissionError
        If more are asked for than there are.

    Examples
    --------
    >>> choose_controls(np.arange(10), np.repeat([0, 1], 5), num=10, seed=0).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    if len(rows) != len(batch_codes):
        raise ValueError(f"expected one batch code for each of {len(rows)} rows, got {len(batch_codes)}")
    if not 0 <= num <= len(rows):
        raise SubmissionError(
            f"controls: {num} control cells asked for, {len(rows)} are there to copy; "
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
