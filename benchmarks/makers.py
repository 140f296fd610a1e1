"""The ways to make cells of a pseudobulk and of control cells, by name, as the benchmarks of cells compare them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.files.scales import normalise_log1p
from pertcast.generate.cells import (
    Donors,
    dense_to_csr,
    draw_counts,
    reweight,
    round_to_counts,
    shift,
    shift_sparing_zeros,
)
from pertcast.stats.counts import fit_counts
from pertcast.stats.draws import generator, uniform_key

__all__ = ["MAKERS", "OF_COUNTS", "Controls", "Csr", "make_cells", "make_counts", "mean_of", "to_log1p", "totals_of"]

MAKERS = ("donors", "negative_binomial", "nb_head", "sparse", "shift", "shift counts", "shift mean only")
OF_COUNTS = ("donors", "negative_binomial", "nb_head", "shift counts")
Csr = sparse.csr_matrix
# a fold of a gene that hardly anyone shows is not told from none
_HALF_SEEN = 1e-3


class Controls(NamedTuple):
    """Control cells of one context: counts, and what they are normalised to."""

    counts: Csr
    target_sum: float

    @property
    def log1p(self) -> Csr:
        """Normalised values."""
        return to_log1p(self.counts, self.target_sum)


def totals_of(counts: Csr) -> NDArray[np.float64]:
    """Return the counts of each cell."""
    return np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()


def to_log1p(counts: Csr, target_sum: float) -> Csr:
    """Return normalised values."""
    return normalise_log1p(counts, totals_of(counts), target_sum)


def mean_of(log1p: Csr) -> NDArray[np.float64]:
    """Return the pseudobulk."""
    return np.asarray(log1p.mean(axis=0, dtype=np.float64)).ravel()


def make_counts(
    controls: Controls, mean: NDArray[np.float64], how: str, *, number: int, seed: int, umi: float | None = None
) -> Csr:
    """Return counts (number, G) that carry a mean, made of a sample of control cells in one of the ways `OF_COUNTS`.

    For "nb_head" the mean is turned into folds of a counts head: rates are as many times those of control cells as
    expm1 of the mean is, at the control cells' dispersion. Of shallow cells that is a rough stand-in.
    """
    donors, key = _donors(controls, number, seed), uniform_key(seed, "cells", how)
    if how == "shift counts":
        moved = dense_to_csr(shift(to_log1p(donors, controls.target_sum).toarray(), mean))
        return round_to_counts(moved, totals_of(donors), key=key)
    fit = fit_counts([(controls.counts, np.zeros(controls.counts.shape[0], dtype=np.int64))], num_batches=1)
    batch = np.zeros(number, dtype=np.int64)
    if how == "nb_head":
        sizes = totals_of(donors) * (1.0 if umi is None else umi / float(np.median(totals_of(donors))))
        fold = np.log((np.expm1(mean) + _HALF_SEEN) / (np.expm1(mean_of(controls.log1p)) + _HALF_SEEN))
        return draw_counts(fit.share, fold, fit.shape, batch=batch, sizes=sizes, key=key)
    given = Donors(donors, batch, controls.target_sum)
    return reweight(given, mean, fit, key=key, median_umi=umi, from_fit=how == "negative_binomial")


def make_cells(
    controls: Controls, mean: NDArray[np.float64], how: str, *, number: int, seed: int, umi: float | None = None
) -> Csr:
    """Return log1p cells (number, G) that carry a mean, made of a sample of control cells."""
    if how in OF_COUNTS:
        made = make_counts(controls, mean, how, number=number, seed=seed, umi=umi)
        return to_log1p(made, controls.target_sum)
    log1p = to_log1p(_donors(controls, number, seed), controls.target_sum).toarray()
    if how == "sparse":
        return dense_to_csr(shift_sparing_zeros(log1p, mean))
    return dense_to_csr(shift(log1p, mean, spread=0.0 if how == "shift mean only" else 1.0))


def _donors(controls: Controls, number: int, seed: int) -> Csr:
    random = generator(seed, "donors")
    laps = [random.permutation(controls.counts.shape[0]) for _ in range(-(-number // controls.counts.shape[0]))]
    return controls.counts[np.concatenate(laps)[:number]]
