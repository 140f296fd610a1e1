"""Initial values of the counts head: rates and dispersions of the training split's control cells.

Invariant: held-out cells, and control cells of other splits, are never read. Shapes: S screens, G predicted genes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pertcast.data.counts_fit import fit_rows
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import ConfigError
from pertcast.stats.draws import generator


class ControlRates(NamedTuple):
    """Rates and dispersions of control cells; see :func:`pertcast.stats.counts.fit_counts`."""

    # float32, logarithm of the mean count in a cell of the total that the store normalises to; a screen
    # without training control cells has the mean of the others
    log_rate_SG: NDArray[np.float32]
    log_shape_G: NDArray[np.float32]  # float32, logarithm of 1 / dispersion, a mean over screens


def control_rates(store: Store, output_genes: NDArray[np.int64]) -> ControlRates:
    """Fit the counts of at most 4,096 training control cells of each screen."""
    if store.scale != "counts" or store.target_sum is None:
        raise ConfigError(
            f"[loss] nb: the counts head learns from whole counts, and {store.path} was made of log1p values; "
            "prepare it from raw counts, or set loss.nb to 0"
        )
    fits = {}
    for screen in range(len(store.screens)):
        rows = store.screen_rows(screen, split=Split.TRAIN, pert=store.control_code)
        if len(rows):
            batch, random = np.zeros(len(rows), dtype=np.int64), generator(0, "rates", store.screen_name(screen))
            fits[screen] = fit_rows(store, rows, batch, num_batches=1, random=random)
    if not fits:
        raise ConfigError(f"[loss] nb: the store {store.path} has no training control cell; correct [training]")
    log_rates = {code: np.log(fit.share[0, output_genes] * store.target_sum) for code, fit in fits.items()}
    common = np.stack(list(log_rates.values())).mean(axis=0)
    return ControlRates(
        np.stack([log_rates.get(code, common) for code in range(len(store.screens))]).astype(np.float32),
        np.stack([np.log(fit.shape[output_genes]) for fit in fits.values()]).mean(axis=0).astype(np.float32),
    )
