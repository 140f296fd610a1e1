"""Effects of the training split: mean log1p of perturbed cells minus that of their screen's control cells.

Invariant: held-out cells and control cells of other splits are never read. Shapes: N training perturbations (each in
its context), S screens, G predicted genes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.progress import Progress

_CELLS_AT_ONCE = 512


class TrainingEffects(NamedTuple):
    """Effects by context and perturbation; a perturbation without controls in its screens has none."""

    contexts: NDArray[np.int64]  # (N,) int64 codes of the store, in their order
    perts: NDArray[np.int64]
    # float32; means over the screens of the context, weighted by cells. NaN for genes that no screen measured
    effects_NG: NDArray[np.float32]
    # float32, of each screen's training control cells; of its context's other screens, or of all, if it has
    # none
    control_mean_SG: NDArray[np.float32]

    def row_of(self) -> dict[tuple[int, int], int]:
        """Return the row of each effect by the codes of its context and perturbation."""
        groups = zip(self.contexts.tolist(), self.perts.tolist(), strict=True)
        return {group: row for row, group in enumerate(groups)}


def training_effects(store: Store, output_genes: NDArray[np.int64], *, progress: Progress) -> TrainingEffects:
    """Read the TRAIN cells once, group by group, and return their effects on the predicted genes."""
    groups = _training_groups(store)
    control = store.control_code
    means: dict[int, NDArray[np.float32]] = {}
    parts: dict[tuple[int, int], list[tuple[int, NDArray[np.float32]]]] = {}
    with progress.task("training effects", len(groups), "groups") as advance:
        # the control cells of each screen come first, so that one effect is in memory at a time
        for (screen, pert), rows in sorted(groups.items(), key=lambda item: item[0][1] != control):
            if pert == control:
                means[screen] = _mean(store, rows)[output_genes]
            elif screen in means:
                effect = _mean(store, rows)[output_genes] - means[screen]
                if store.measured_SG is not None:
                    effect[~store.measured_SG[screen, output_genes]] = np.nan
                parts.setdefault((store.screens[screen].context, pert), []).append((len(rows), effect))
            advance(1)
    named = sorted(parts)
    codes = np.array(named, dtype=np.int64).reshape(-1, 2)
    effects = [_combined(parts.pop(key)) for key in named]
    return TrainingEffects(
        contexts=codes[:, 0],
        perts=codes[:, 1],
        effects_NG=np.stack(effects) if effects else np.zeros((0, len(output_genes)), np.float32),
        control_mean_SG=np.stack(
            [_control_mean(store, means, screen, output_genes) for screen in range(len(store.screens))]
        ),
    )


def mean_effect(effects_NG: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the mean effect on each gene over the perturbations that measured it, else 0."""
    measured_NG = ~np.isnan(effects_NG)
    if measured_NG.all():
        return effects_NG.mean(axis=0)
    total_G, number_G = np.nan_to_num(effects_NG).sum(axis=0), measured_NG.sum(axis=0)
    return np.asarray(total_G / np.maximum(number_G, 1), dtype=np.float32)


def _combined(parts: list[tuple[int, NDArray[np.float32]]]) -> NDArray[np.float32]:
    """Return the mean of effects weighted by cells, each gene over the screens that measured it."""
    if len(parts) == 1:
        return parts[0][1]
    effect_KG = np.stack([effect for _, effect in parts])
    weight_KG = np.where(np.isnan(effect_KG), 0, np.array([cells for cells, _ in parts])[:, None])
    total_G = weight_KG.sum(0)
    sum_G = (np.nan_to_num(effect_KG) * weight_KG).sum(0)
    return np.where(total_G > 0, sum_G / np.maximum(total_G, 1), np.nan).astype(np.float32)


def _control_mean(
    store: Store, means: dict[int, NDArray[np.float32]], screen: int, output_genes: NDArray[np.int64]
) -> NDArray[np.float32]:
    if screen in means:
        return means[screen]
    context = store.screens[screen].context
    others = [mean for code, mean in means.items() if store.screens[code].context == context]
    return np.mean(others, axis=0) if others else store.control_mean_log1p[output_genes]


def _training_groups(store: Store) -> dict[tuple[int, int], NDArray[np.int64]]:
    """Return the rows of each (screen, perturbation) of the training split, in the order of codes."""
    rows = store.rows(split=Split.TRAIN)
    keys = store.screen_codes[rows].astype(np.int64) * len(store.perts) + store.pert_codes[rows]
    order = np.argsort(keys, kind="stable")
    distinct, starts = np.unique(keys[order], return_index=True)
    pieces = np.split(rows[order], starts[1:])
    return {divmod(int(key), len(store.perts)): piece for key, piece in zip(distinct, pieces, strict=True)}


def _mean(store: Store, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    total = np.zeros(len(store.genes), dtype=np.float64)
    for start in range(0, len(rows), _CELLS_AT_ONCE):
        block = store.csr(rows[start : start + _CELLS_AT_ONCE])
        total += np.bincount(block.indices, weights=block.data, minlength=len(total))
    return (total / len(rows)).astype(np.float32)
