"""Predict the held-out targets of a run once, to score many scalings of their effects.

Invariant: test cells, and labels that any screen holds out for test, are never read. Legend of shapes: B sets, S cells
in a set, O predicted genes, G genes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pertcast.config import Experiment, FewshotConfig, GenerateConfig, rebuild_experiment
from pertcast.data.cell_sets import generation_sets
from pertcast.data.features import open_features
from pertcast.data.prepare import prepare
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import CheckpointError, ConfigError
from pertcast.generate.calibration import amplify, effect_size, largest_log1p
from pertcast.generate.cells import CellMaker
from pertcast.generate.plan import Part
from pertcast.generate.predict import make_predictor
from pertcast.ladder.score import compare_sides
from pertcast.ladder.scored_side import PseudobulkStats, make_side
from pertcast.models.run_folder import Run, open_run
from pertcast.progress import Progress
from pertcast.stats.draws import generator
from pertcast.stats.groups import CellGroups, group_cells
from pertcast.train import train


def refit(
    run_path: Path, store_path: Path, *, folds: int, steps: int | None, progress: Progress
) -> list[tuple[Path, Path]]:
    """Train a network for each fold beside the run; finished ones are reused."""
    run, store = open_run(run_path), Store.open(store_path)
    if "num_learning" in run.metrics:
        raise CheckpointError(
            f"{run_path}: it was adapted from another run, but folds train from the start; remove --folds"
        )
    experiment = rebuild_experiment(run.experiment, place=run_path / "run.json")
    trained = np.unique(store.pert_codes[(store.split & Split.TRAIN) != 0])
    targets = sorted(store.perts[code] for code in trained if code != store.control_code)
    if not 2 <= folds <= len(targets):
        raise ConfigError(f"--folds: expected 2 to {len(targets)}, the number of training targets, got {folds}")
    order = generator(experiment.train.seed, "calibrate", "folds").permutation(len(targets))
    base = run_path.with_name(f"{run_path.name}_folds")
    pairs = []
    for fold in range(folds):
        held = {targets[place] for place in order[fold::folds]}
        ours = _without(experiment, store, held)
        if steps is not None:
            ours = ours.model_copy(update={"train": ours.train.model_copy(update={"steps": steps})})
        progress.note(f"fold {fold + 1} of {folds}: without {len(held)} of {len(targets)} training targets")
        place = prepare(ours, base / f"store_{fold}", progress=progress)
        pairs.append((train(ours, place, base / f"run_{fold}", progress=progress), place))
    return pairs


def _without(experiment: Experiment, store: Store, held: set[str]) -> Experiment:
    """Return the experiment with some targets validating, and all its earlier held-out cells unused."""
    fewshot = {}
    used = (store.split & Split.TRAIN) != 0
    pairs = np.unique(np.stack([store.dataset_codes[used], store.context_codes[used]]), axis=1).T
    for dataset, context in pairs.tolist():
        rows = (store.dataset_codes == dataset) & (store.context_codes == context)
        flags = store.split[rows]
        labels = {flag: _names(store, store.pert_codes[rows][(flags & flag) != 0]) for flag in Split}
        training = labels[Split.TRAIN]
        # cells of a training target may validate (prepare.holdout_cells)
        others = (labels[Split.VAL] | labels[Split.TEST]) - training
        if training:
            key = f"{store.datasets[dataset]}.{store.contexts[context]}"
            fewshot[key] = FewshotConfig(val=tuple(sorted(held & training)), test=tuple(sorted(others)))
    zeroshot = {key: "test" if split != "train" else split for key, split in experiment.zeroshot.items()}
    kept = {key: split for key, split in zeroshot.items() if key not in fewshot}
    return experiment.model_copy(update={"fewshot": fewshot, "zeroshot": kept})


def _names(store: Store, codes: np.ndarray) -> set[str]:
    return {store.perts[code] for code in np.unique(codes)} - {store.control}


_MOST_TARGETS = 48
_MOST_CELLS = 256
_MOST_CONTROLS = 2048
Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class UnseenTargets:
    """The held-out targets of one dataset and context of a run."""

    store: Store  # Where control cells are read from, how cells are made, and which genes are predicted
    config: GenerateConfig
    output_genes: NDArray[np.int64]
    context: str  # Its name
    parts: tuple[Part, ...]  # One for each target, sorted
    rows: tuple[Rows, ...]  # (B, S) control cells of each
    predicted: tuple[NDArray[np.float32], ...]  # (B, S, O) log1p of each, as the network gives them
    controls: Rows  # Rows of control cells that cells may be made from
    truth: PseudobulkStats  # The real cells

    def sizes(self) -> list[float]:
        """Return the size of each target's predicted effect."""
        return [
            float(np.mean([effect_size(*pair) for pair in zip(cells_BSO, self._controls_of(rows_BS), strict=True)]))
            for rows_BS, cells_BSO in zip(self.rows, self.predicted, strict=True)
        ]

    def scores(self, amplitudes: Mapping[str, float], *, spread: float) -> list[dict[str, float]]:
        """Return the official metrics of each target with its effect scaled."""
        maker = CellMaker(self.store, self.config.model_copy(update={"residual_scale": spread}))
        blocks, codes = [], []
        for code, (part, rows_BS, cells_BSO) in enumerate(zip(self.parts, self.rows, self.predicted, strict=True)):
            scaled = self._scaled(rows_BS, cells_BSO, amplitudes[part.target])
            made = maker.made(part, rows_BS.reshape(-1)[: part.num_cells], scaled, pool=self.controls)
            cells = sparse.vstack(list(made), format="csr")[: part.num_cells]
            blocks.append(cells)
            codes.append(np.full(cells.shape[0], code, dtype=np.int64))
        return self._compare(sparse.vstack(blocks, format="csr"), np.concatenate(codes))

    def copies(self) -> list[dict[str, float]]:
        """Return the metrics of control cells in place of predicted ones."""
        rows = [rows_BS.reshape(-1)[: part.num_cells] for part, rows_BS in zip(self.parts, self.rows, strict=True)]
        codes = np.repeat(np.arange(len(rows)), [len(some) for some in rows])
        return self._compare(self.store.csr(np.concatenate(rows)), codes)

    def _compare(self, cells: sparse.csr_matrix, codes: NDArray[np.int64]) -> list[dict[str, float]]:
        names = tuple(part.target for part in self.parts)
        side = make_side(group_cells(cells, codes), _groups_of(self.store, self.controls), names, self.store.genes)
        return list(compare_sides(side, self.truth).values())

    def _controls_of(self, rows_BS: Rows) -> Iterator[NDArray[np.float32]]:
        return (self.store.log1p(rows_S, genes=self.output_genes) for rows_S in rows_BS)

    def _scaled(self, rows_BS: Rows, cells_BSO: NDArray[np.float32], amplitude: float) -> Iterator[NDArray[np.float32]]:
        """Yield scaled cells over all genes, a set at a time; unpredicted genes are the control cell's."""
        for rows_S, cells_SO in zip(rows_BS, cells_BSO, strict=True):
            cells_SG = self.store.log1p(rows_S)
            cells_SG[:, self.output_genes] = amplify(
                cells_SO, cells_SG[:, self.output_genes], amplitude, ceiling=largest_log1p(self.store)
            )
            yield cells_SG


def unseen_targets(run: Run, store: Store, experiment: Experiment, *, progress: Progress) -> list[UnseenTargets]:
    """Predict the validation targets of a run, screen by screen, that no cell of their screen trained."""
    config = experiment.generate.model_copy(update={"scale": "log1p", "calibrated": False})
    predictor = make_predictor(run, store, open_features(run.path / "features"))
    chosen = [(screen, perts) for screen in range(len(store.screens)) if (perts := _targets(store, screen))]
    found = []
    with progress.task("predict held-out targets", sum(len(perts) for _, perts in chosen), "targets") as advance:
        for screen, perts in chosen:
            dataset, context = store.screens[screen].dataset, store.screens[screen].context
            name = store.contexts[context]
            pool = store.screen_rows(screen, split=Split.TRAIN, pert=store.control_code)
            if not len(pool):
                continue
            real = [_draw(store.screen_rows(screen, split=Split.VAL, pert=pert), _MOST_CELLS, pert) for pert in perts]
            parts, rows, predicted = [], [], []
            for pert, cells in zip(perts, real, strict=True):
                target = store.perts[pert]
                rows_BS = generation_sets(
                    store,
                    context=context,
                    target=target,
                    num_cells=len(cells),
                    set_size=run.spec.set_size,
                    seed=config.seed,
                    controls=pool,
                )
                cells_CO = np.concatenate(
                    [predictor.predict(rows_BS[[place]], target=target, context=name) for place in range(len(rows_BS))]
                )
                parts.append(Part("", store.datasets[dataset], name, target, len(cells)))
                rows.append(rows_BS)
                predicted.append(cells_CO.reshape(*rows_BS.shape, -1))
                advance(1)
            controls = store.screen_rows(screen, split=Split.TRAIN | Split.VAL, pert=store.control_code)
            controls = controls[(store.split[controls] & Split.TEST) == 0]
            codes = np.repeat(np.arange(len(real)), [len(some) for some in real])
            truth = make_side(
                group_cells(store.csr(np.concatenate(real)), codes),
                _groups_of(store, _draw(controls, _MOST_CONTROLS, -1)),
                tuple(part.target for part in parts),
                store.genes,
            )
            pool = _draw(pool, _MOST_CONTROLS, -2)
            one = UnseenTargets(
                store, config, run.output_genes, name, tuple(parts), tuple(rows), tuple(predicted), pool, truth
            )
            found.append(one)
    return found


def _targets(store: Store, screen: int) -> list[int]:
    """Return codes of the targets of a screen that only validate, sorted by name, at most 48."""
    context = store.screens[screen].context
    forbidden = np.unique(store.pert_codes[store.rows(split=Split.TRAIN | Split.TEST, context=context)])
    validating = np.unique(store.pert_codes[store.screen_rows(screen, split=Split.VAL)])
    own = np.setdiff1d(validating, np.append(forbidden, store.control_code))
    return sorted(_draw(own, _MOST_TARGETS, context).tolist(), key=lambda pert: store.perts[pert])


def _draw(values: Rows, most: int, key: int) -> Rows:
    """Return the values, or a random subset of so many, ascending."""
    if len(values) <= most:
        return values
    return np.sort(generator(0, "calibrate", key).choice(values, most, replace=False))


def _groups_of(store: Store, rows: Rows) -> CellGroups:
    return group_cells(store.csr(rows), np.zeros(len(rows), dtype=np.int64))
