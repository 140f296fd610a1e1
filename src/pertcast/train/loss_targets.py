"""Effects and DE labels of the training split, with which the auxiliary loss terms compare a prediction.

Invariant: held-out cells and control cells of other splits are never read. Shapes: N training perturbations (each in
its context), S screens, P perturbations, G predicted genes, B sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from pertcast.data.de_labels import de_labels
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.progress import Progress
from pertcast.stats.de import FDR
from pertcast.stats.draws import generator
from pertcast.train.control_counts import ControlRates
from pertcast.train.training_effects import TrainingEffects, training_effects

_CELLS_AT_ONCE = 512


def call_thresholds(
    store: Store, codes: NDArray[np.int64], num_significant: NDArray[np.int64], genes: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the smallest effect, in log1p units, that the test calls, for each perturbation and gene, ``(N, G)``."""
    row_of = {pair: row for row, pair in enumerate(map(tuple, codes.tolist()))}
    trained = store.rows(split=Split.TRAIN)
    sources = store.screen_codes[trained].astype(np.int64) * len(store.perts) + store.pert_codes[trained]
    distinct, sizes = np.unique(sources, return_counts=True)
    num_cells = {
        divmod(source, len(store.perts)): size for source, size in zip(distinct.tolist(), sizes.tolist(), strict=True)
    }
    variance_NG, total_N = np.zeros((len(codes), len(genes))), np.zeros(len(codes))
    for screen, of in enumerate(store.screens):
        num_controls = num_cells.get((screen, store.control_code), 0)
        if not num_controls:
            continue
        controls = store.screen_rows(screen, split=Split.TRAIN, pert=store.control_code)
        spread_G = np.maximum(_spread(store, controls)[genes], 1 / np.sqrt(num_controls))
        for (other, pert), size in num_cells.items():
            row = row_of.get((of.context, pert))
            if other == screen and row is not None:
                variance_NG[row] += (size * spread_G) ** 2 * (1 / size + 1 / num_controls)
                total_N[row] += size
    share_N = FDR * np.maximum(num_significant, 1) / len(store.genes)
    quantile_N = -special.ndtri(np.minimum(share_N, 1) / 2)
    threshold_NG = (quantile_N / np.maximum(total_N, 1))[:, None] * np.sqrt(variance_NG)
    return threshold_NG.astype(np.float32)


def _spread(store: Store, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the standard deviation of each gene's log1p values over some cells."""
    sums, squares = np.zeros(len(store.genes)), np.zeros(len(store.genes))
    for start in range(0, len(rows), _CELLS_AT_ONCE):
        block = store.csr(rows[start : start + _CELLS_AT_ONCE])
        values = block.data.astype(np.float64)
        sums += np.bincount(block.indices, weights=values, minlength=len(sums))
        squares += np.bincount(block.indices, weights=values**2, minlength=len(squares))
    count = max(len(rows), 1)
    variance: NDArray[np.float64] = np.maximum(squares / count - (sums / count) ** 2, 0)
    return np.sqrt(variance)


_LARGEST_WEIGHT = 100.0


class BatchTargets(NamedTuple):
    """Effects and labels of the sets of a batch, on its device."""

    control_mean_BG: Tensor  # Mean log1p expression of the training control cells of each set's screen
    # The reference of a predicted effect: the same, or the mean of the set's own control cells
    reference_mean_BG: Tensor
    # The training effect of each set's perturbation; 0 if there is none, and for genes that were not
    # measured
    effect_BG: Tensor
    has_effect_B: Tensor  # Where there is one
    labels_BG: Tensor | None  # Whether a gene is differentially expressed, and where that is known
    valid_BG: Tensor | None
    threshold_BG: Tensor | None  # The size of effect from which on the official test calls a gene, about
    own_gene_B: Tensor  # The position of the perturbation's own gene among those predicted, -1 if it is not
    is_control_B: Tensor  # Whether the set is of control cells
    # Logarithm of the mean normalised count in control cells of each set's screen, where the counts head is
    # trained
    log_rate_BG: Tensor | None = None
    # Which genes were measured, in the set's screen and where its effect is from; ``None`` if all genes were
    measured_BG: Tensor | None = None


class TrainingTargets:
    """Effects and labels of the training split."""

    def __init__(
        self,
        store: Store,
        effects: TrainingEffects,
        output_genes: NDArray[np.int64],
        *,
        labels_NG: NDArray[np.bool_] | None = None,
        threshold_NG: NDArray[np.float32] | None = None,
        log_rate_SG: NDArray[np.float32] | None = None,
    ) -> None:
        self._store, self._contexts, self._perts = store, effects.contexts, effects.perts
        row_CP = np.full((len(store.contexts), len(store.perts)), -1, dtype=np.int64)
        row_CP[effects.contexts, effects.perts] = np.arange(len(effects.perts))
        gene_of = {store.genes[gene]: number for number, gene in enumerate(output_genes.tolist())}
        # a store without effects still needs a row to look up
        effects_NG = effects.effects_NG if len(effects.perts) else np.zeros((1, len(output_genes)), np.float32)
        measured_NG = ~np.isnan(effects_NG)
        self.effects_NG = torch.from_numpy(np.nan_to_num(effects_NG))
        self._row_CP = torch.from_numpy(row_CP)
        self._own_gene_P = torch.tensor([gene_of.get(name, -1) for name in store.perts])
        self._measured_NG = None if measured_NG.all() else torch.from_numpy(measured_NG)
        self._control_mean_SG = torch.from_numpy(effects.control_mean_SG)
        self._labels_NG = None if labels_NG is None else torch.from_numpy(labels_NG)
        self._threshold_NG = None if threshold_NG is None else torch.from_numpy(threshold_NG)
        self._log_rate_SG = None if log_rate_SG is None else torch.from_numpy(log_rate_SG)
        share = 0.0 if labels_NG is None else float(labels_NG.mean())
        self.positive_weight = float(np.clip((1 - share) / share, 1, _LARGEST_WEIGHT)) if share else 1.0

    def to(self, device: torch.device) -> TrainingTargets:
        """Move everything to a device; return itself."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def of(
        self, context_B: Tensor, pert_B: Tensor, screen_B: Tensor, measured_BG: Tensor | None = None
    ) -> BatchTargets:
        """Return the targets of some sets, by their codes and the genes that their screens measured."""
        row_B = self._row_CP[context_B, pert_B]
        has_effect_B = row_B >= 0
        found_B = row_B.clamp_min(0)
        labels, threshold = self._labels_NG, self._threshold_NG
        if self._measured_NG is not None:
            of_effect_BG = self._measured_NG[found_B] | ~has_effect_B[:, None]
            measured_BG = of_effect_BG if measured_BG is None else measured_BG & of_effect_BG
        effect_BG = self.effects_NG[found_B] * has_effect_B[:, None]
        valid_BG = has_effect_B[:, None].expand_as(effect_BG)
        if measured_BG is not None:
            effect_BG, valid_BG = effect_BG * measured_BG, valid_BG & measured_BG
        return BatchTargets(
            control_mean_BG=self._control_mean_SG[screen_B],
            reference_mean_BG=self._control_mean_SG[screen_B],
            effect_BG=effect_BG,
            has_effect_B=has_effect_B,
            labels_BG=None if labels is None else labels[found_B] & valid_BG,
            valid_BG=None if labels is None else valid_BG,
            threshold_BG=None if threshold is None else threshold[found_B],
            own_gene_B=self._own_gene_P[pert_B],
            is_control_B=pert_B == self._store.control_code,
            log_rate_BG=None if self._log_rate_SG is None else self._log_rate_SG[screen_B],
            measured_BG=measured_BG,
        )

    def draw_others(
        self, groups: Sequence[tuple[int, int]], *, num: int, seed: int, keys: Sequence[tuple[str | int, ...]]
    ) -> Tensor:
        """Draw rows of `effects_NG` of other perturbations of each set's context, (B, num), -1 if too few."""
        rows_BK = np.full((len(groups), num), -1, dtype=np.int64)
        for place, ((context, pert), key) in enumerate(zip(groups, keys, strict=True) if num else ()):
            others = np.flatnonzero((self._contexts == context) & (self._perts != pert))
            random = generator(seed, "others", *key)
            drawn = random.choice(others, size=min(num, len(others)), replace=False)
            rows_BK[place, : len(drawn)] = drawn
        return torch.from_numpy(rows_BK)


def training_targets(
    store: Store,
    output_genes: NDArray[np.int64],
    *,
    labels: bool,
    rates: ControlRates | None = None,
    progress: Progress,
) -> TrainingTargets:
    """Read the TRAIN cells once, group by group, and return their effects, with DE labels if `labels`."""
    effects = training_effects(store, output_genes, progress=progress)
    codes = np.stack([effects.contexts, effects.perts], axis=1)
    labels_NG, threshold_NG = None, None
    if labels and len(codes):
        found = de_labels(store, progress=progress)
        # They were adjusted over all genes, whichever of them are predicted.
        significant_NG = found.significant[found.find(codes[:, 0], codes[:, 1])]
        labels_NG = significant_NG[:, output_genes]
        threshold_NG = call_thresholds(store, codes, significant_NG.sum(axis=1), output_genes)
    elif labels:
        labels_NG = np.zeros((1, len(output_genes)), dtype=bool)
        threshold_NG = np.ones(labels_NG.shape, dtype=np.float32)
    return TrainingTargets(
        store,
        effects,
        output_genes,
        labels_NG=labels_NG,
        threshold_NG=threshold_NG,
        log_rate_SG=None if rates is None else rates.log_rate_SG,
    )
