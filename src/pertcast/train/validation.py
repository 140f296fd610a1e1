"""Choose the best validated step, by the loss or by the official metrics.

Real cells, their DE genes and the training-mean baseline are measured once, before training. Cells are predicted from
TRAIN control cells with the same draws at every validation, without dropout. Metrics are of the predicted genes. Each
screen with validation perturbations and training controls is scored alone, and the means are over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from scipy import sparse

from pertcast.config import TrainConfig
from pertcast.data.cell_sets import CellSets, generation_sets
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import ConfigError
from pertcast.files.resources import available_cpus
from pertcast.models.state import Prediction
from pertcast.progress import Progress
from pertcast.stats.draws import generator
from pertcast.stats.metrics import BEST, Profile, constant_profile, overall, profile_of, score_profiles
from pertcast.train.batches import Batch, SetReader
from pertcast.train.devices import is_sharded
from pertcast.train.training_effects import mean_effect, training_effects

_MOST_CELLS = 256
_PREFIX = "held_out_"


def criterion(values: Mapping[str, float], select_by: str) -> float:
    """Return the value of a validation that the best step minimises.

    >>> criterion({"loss": 2.0, "held_out_pds": 0.75}, "pds")
    -0.75
    """
    if select_by == "loss":
        return values["loss"]
    return values[_PREFIX + select_by] * (1 if select_by == "mae" else -1)


class _Truth(NamedTuple):
    """The P validation perturbations of one screen."""

    sets: CellSets
    pert_of_cell: NDArray[np.int64]
    own_gene_P: NDArray[np.int64]
    controls: sparse.csr_matrix
    real: Profile
    baseline: dict[str, NDArray[np.float64]]


class OfficialMetrics:
    """Measure a network on the validation perturbations with the official metrics."""

    def __init__(self, store: Store, reader: SetReader, train: TrainConfig, *, progress: Progress) -> None:
        self._reader, self._size = reader, train.sets_per_step
        rows = store.rows(split=Split.VAL)
        rows = rows[store.pert_codes[rows] != store.control_code]
        effects = training_effects(store, reader.output_genes, progress=progress)
        self._screens: list[_Truth] = []
        screens = np.unique(store.screen_codes[rows]).tolist()
        with progress.task("validation truth", len(screens), "screens") as advance:
            for screen in screens:
                controls = store.screen_rows(screen, split=Split.TRAIN, pert=store.control_code)
                if len(controls):
                    mine = effects.effects_NG[effects.contexts == store.screens[screen].context]
                    effect_G = mean_effect(mine if len(mine) else effects.effects_NG)
                    # another context's effect, and rounding, may take more than there is
                    mean_G = np.maximum(effects.control_mean_SG[screen] + effect_G, np.float32(0))
                    if store.measured_SG is not None:
                        mean_G *= store.measured_SG[screen, reader.output_genes]
                    cells = rows[store.screen_codes[rows] == screen]
                    self._screens.append(_truth(store, reader, cells, controls, mean_G=mean_G, seed=train.seed))
                advance(1)
        if not self._screens:
            raise ConfigError(
                f'[train] select_by: "{train.select_by}" needs validation perturbations with training control cells, '
                f'and {store.path} has none; list some as val in [fewshot], or set train.select_by = "loss"'
            )

    def measure(self, predict: Callable[[Batch], Prediction], fabric: Fabric) -> dict[str, float]:
        """Return ``held_out_`` mae, pds, des and overall, the same on all devices."""
        values = self._measure(predict) if fabric.is_global_zero else {}
        if is_sharded(fabric) and not fabric.is_global_zero:
            self._take_part(predict)
        return fabric.broadcast(values)

    @torch.no_grad()
    def _measure(self, predict: Callable[[Batch], Prediction]) -> dict[str, float]:
        scores: list[dict[str, NDArray[np.float64]]] = []
        for truth in self._screens:
            cells = np.concatenate(list(self._predict(truth, predict)))
            kept = truth.pert_of_cell >= 0
            predicted = _profile(cells[kept], truth.pert_of_cell[kept], truth.controls)
            scores.append(score_profiles(predicted, truth.real, truth.own_gene_P))
        ours = {name: float(np.concatenate([score[name] for score in scores]).mean()) for name in BEST}
        base = {name: float(np.concatenate([part.baseline[name] for part in self._screens]).mean()) for name in BEST}
        return {_PREFIX + name: value for name, value in {**ours, "overall": overall(ours, base)}.items()}

    @torch.no_grad()
    def _take_part(self, predict: Callable[[Batch], Prediction]) -> None:
        """Join the first process's calls, as a sharded network needs."""
        for truth in self._screens:
            for _cells in self._predict(truth, predict):
                pass

    def _predict(self, truth: _Truth, predict: Callable[[Batch], Prediction]) -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(truth.sets), self._size):
            batch = self._reader.read(truth.sets[start : start + self._size])
            cells_BSG = predict(batch).unclipped_BSG
            if batch.measured_BG is not None:
                cells_BSG = cells_BSG * batch.measured_BG[:, None]
            yield cells_BSG.flatten(0, 1).float().cpu().numpy()


def _profile(cells: NDArray[np.float32], codes: NDArray[np.int64], controls: sparse.csr_matrix) -> Profile:
    """Return the profile of cells clipped at 0, with the mean of the unclipped prediction."""
    found = profile_of(np.maximum(cells, np.float32(0)), codes, controls, threads=available_cpus())
    means = np.stack([cells[codes == pert].mean(axis=0, dtype=np.float64) for pert in range(len(found.means))])
    means = np.maximum(means, 0)
    return found._replace(means=means, effects=found.effects + (means - found.means))


def _truth(
    store: Store,
    reader: SetReader,
    rows: NDArray[np.int64],
    controls: NDArray[np.int64],
    *,
    mean_G: NDArray[np.float32],
    seed: int,
) -> _Truth:
    """Return the truth of one screen, from a sample of its validation cells if there are many."""
    context, screen = int(store.context_codes[rows[0]]), int(store.screen_codes[rows[0]])
    size = reader.spec.set_size
    perts_P = np.unique(store.pert_codes[rows]).astype(np.int64)
    real, sets, pert_of_cell = [], [], []
    for place, pert in enumerate(perts_P):
        mine = rows[store.pert_codes[rows] == pert]
        label = store.perts[pert]
        mine = np.sort(generator(seed, "select", store.contexts[context], label).permutation(mine)[:_MOST_CELLS])
        real.append(mine)
        drawn = generation_sets(
            store, context=context, target=label, num_cells=len(mine), set_size=size, seed=seed, controls=controls
        )
        sets.append(drawn)
        # the surplus of the last set is no cell
        pert_of_cell.append(np.where(np.arange(drawn.size) < len(mine), place, -1))
    control_rows = np.concatenate(sets)
    whole = len(reader.output_genes) == len(store.genes)
    genes = None if whole else reader.output_genes
    controls_csr = sparse.csr_matrix(store.csr(controls) if genes is None else store.log1p(controls, genes=genes))
    sizes_P = np.array([len(mine) for mine in real])
    cells = np.concatenate(real)
    cells_csr = sparse.csr_matrix(store.csr(cells) if genes is None else store.log1p(cells, genes=genes))
    position = {store.genes[gene]: place for place, gene in enumerate(reader.output_genes.tolist())}
    own_gene_P = np.array([position.get(store.perts[pert], -1) for pert in perts_P])
    real_profile = profile_of(
        cells_csr, np.repeat(np.arange(len(perts_P)), sizes_P), controls_csr, threads=available_cpus()
    )
    constant = constant_profile(mean_G, sizes_P, controls_csr, threads=available_cpus())
    of_set = np.repeat(perts_P, [len(drawn) for drawn in sets]).astype(np.int32)
    return _Truth(
        CellSets(
            pert=of_set,
            context=np.full(len(of_set), context, dtype=np.int32),
            screen=np.full(len(of_set), screen, dtype=np.int32),
            # the set's real cells are not needed; its controls fill their place
            pert_rows=control_rows,
            control_rows=control_rows,
        ),
        np.concatenate(pert_of_cell),
        own_gene_P,
        controls_csr,
        real_profile,
        score_profiles(constant, real_profile, own_gene_P),
    )
