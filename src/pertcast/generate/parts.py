"""Make one part after another: read sets of control cells, predict, and write one h5ad."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from threading import Event

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from pertcast.config import Experiment
from pertcast.data.cell_sets import generation_sets
from pertcast.data.features import PertFeatures
from pertcast.data.store import Store
from pertcast.errors import CheckpointError, ConfigError
from pertcast.files.artefacts import (
    Manifest,
    atomic_file,
    manifest_path,
    read_manifest,
    remove_leftovers,
    verify_artefact,
    write_manifest,
)
from pertcast.files.h5ad_writer import CsrWriter
from pertcast.files.resources import available_cpus, prefetch
from pertcast.generate.calibration import CalibratedPredictor, calibrated
from pertcast.generate.cells import CellMaker
from pertcast.generate.plan import Part, control_rows
from pertcast.generate.predict import (
    CentredPredictor,
    CountsHeadPredictor,
    Predictor,
    make_predictor,
    predicting_threads,
    shapes_of,
)
from pertcast.models.run_folder import Run
from pertcast.progress import Advance
from pertcast.submission.controls import choose_controls

_MOST_WRITERS = 8
"""No more parts are made at the same time, since each needs memory of its own."""


class PartMaker:
    """Make one part after another with one model."""

    def __init__(self, run: Run, store: Store, experiment: Experiment, features: PertFeatures, weights: str) -> None:
        self._calibration, experiment = calibrated(run, experiment)
        self._run, self._store, self._experiment, self._features = run, store, experiment, features
        self._from_head = experiment.generate.cells == "nb_head"
        shapes = self._shapes() if self._from_head else None
        self._predictor: Predictor = (
            CountsHeadPredictor(run, store, features) if self._from_head else make_predictor(run, store, features)
        )
        if experiment.generate.subtract_control_prediction:
            self._predictor = CentredPredictor(self._predictor, store, output_genes=run.output_genes)
        if self._calibration is not None:
            self._predictor = CalibratedPredictor(
                self._predictor, store, self._calibration, output_genes=run.output_genes
            )
        cap = experiment.submission.resolve().max_cell_sum
        self._cells = CellMaker(store, experiment.generate, cap=cap, shapes=shapes)
        self.inputs = {"weights": weights, "store": store.fingerprint}
        missing = len(run.genes) - len(run.output_genes)
        if missing and experiment.generate.unpredicted_genes == "error":
            raise ConfigError(
                f"[generate] unpredicted_genes: the model predicts {len(run.output_genes):,} of {len(run.genes):,} "
                'genes; pass --set generate.unpredicted_genes="control" to copy the others from the control cells, '
                'or train with model.output = "genes"'
            )

    def _shapes(self) -> NDArray[np.float64]:
        """Return the counts head's 1 / dispersion of all genes, NaN for unpredicted ones."""
        shapes_G = np.full(len(self._run.genes), np.nan)
        shapes_G[self._run.output_genes] = shapes_of(self._run)
        return shapes_G

    def _settings(self, part: Part) -> dict[str, object]:
        """Return everything that a part's values depend on besides weights and store."""
        generate, submission = self._experiment.generate, self._experiment.submission
        settings: dict[str, object] = {
            "seed": generate.seed,
            "controls_from": generate.controls_from,
            "scale": generate.scale,
            "unpredicted_genes": generate.unpredicted_genes,
            "dataset": part.dataset,
            "context": part.context,
            "target": part.target,
            "num_cells": part.num_cells,
            "copied": part.copied,
            "season": submission.season,
            "target_sum": self._store.target_sum,
        }
        if not part.copied:
            settings |= {
                "cells": generate.cells,
                "residual_scale": generate.residual_scale,
                "subtract_control_prediction": generate.subtract_control_prediction,
            }
            if self._calibration is not None:
                settings["calibration"] = self._calibration.fingerprint
            if self._cells.have_a_depth:
                settings["median_umi"] = part.median_umi
            feature = self._features.of([self._label(part.target)])
            settings["feature"] = hashlib.sha256(feature.tobytes()).hexdigest()
        return settings

    def _label(self, target: str) -> str:
        """Return the store's label of a target; the season may name the control differently."""
        return self._store.control if target == self._experiment.submission.resolve().control_label else target

    def is_right(self, out: Path, part: Part) -> bool:
        """Decide whether a part can be reused."""
        path = out / part.file
        if not path.is_file() or not manifest_path(path).is_file():
            return False
        same = read_manifest(path, kind="part").matches(inputs=self.inputs, config=self._settings(part))
        return same and not verify_artefact(path)

    def make(self, out: Path, parts: Sequence[Part], *, done: Callable[[Part], None]) -> None:
        """Write parts and their manifests, calling `done` after each; other threads predict the next ones."""
        batches = ((part, sets_BS) for part in parts if not part.copied for sets_BS in self._batches(part))
        threads = 1 if self._cells.keep_predicted else max(1, min(_MOST_WRITERS, available_cpus() // 2))
        with ExitStack() as stack:
            at_once = stack.enter_context(predicting_threads())
            ahead = prefetch(batches, lambda item: self._predict(*item), threads=at_once)
            predicted = stack.enter_context(closing(ahead))  # type: ignore[type-var]
            jobs = ((part, self._blocks(part, predicted)) for part in parts)
            stopped = Event()
            for part in prefetch(jobs, lambda job: self._write(out, *job, stopped), threads=threads, stopped=stopped):
                done(part)

    def _write(self, out: Path, part: Part, blocks: Iterator[sparse.csr_matrix], stopped: Event) -> Part:
        path = out / part.file
        path.parent.mkdir(exist_ok=True)
        remove_leftovers(path)
        manifest_path(path).unlink(missing_ok=True)
        with atomic_file(path) as temporary, CsrWriter(temporary, self._run.genes) as writer:
            for block in blocks:
                writer.append(block)
                del block  # the next one is made without it
                if stopped.is_set():
                    raise CancelledError
            writer.finish(self._obs(part))
        write_manifest(path, Manifest("part", inputs=self.inputs, config=self._settings(part)))
        return part

    def _rows(self, part: Part) -> NDArray[np.int64]:
        """Return the rows of control cells from which the part's cells are copied or made."""
        pool = control_rows(self._store, self._experiment, part.dataset, part.context)
        seed = self._experiment.generate.seed
        if part.copied:
            return choose_controls(pool, self._store.batch_codes[pool], num=part.num_cells, seed=seed)
        return generation_sets(
            self._store,
            context=self._store.contexts.index(part.context),
            target=part.target,
            num_cells=part.num_cells,
            set_size=self._run.spec.set_size,
            seed=seed,
            controls=pool,
        ).reshape(-1)

    def _obs(self, part: Part) -> pd.DataFrame:
        rows = self._rows(part)[: part.num_cells]
        season, store = self._experiment.submission.resolve(), self._store
        obs = pd.DataFrame({season.pert_column: pd.Categorical([part.target] * len(rows))})
        if season.context_column is not None:
            obs[season.context_column] = pd.Categorical([part.context] * len(rows))
        if store.batches:
            codes = store.batch_codes[rows]
            obs["batch"] = pd.Categorical([store.batches[code] if code >= 0 else "unknown" for code in codes])
        obs.index = obs.index.astype(str)
        return obs

    def _batches(self, part: Part) -> Iterator[NDArray[np.int64]]:
        sets_NS = self._rows(part).reshape(-1, self._run.spec.set_size)
        size = self._experiment.generate.sets_per_step
        return (sets_NS[start : start + size] for start in range(0, len(sets_NS), size))

    def _blocks(self, part: Part, predicted: Iterator[NDArray[np.float32]]) -> Iterator[sparse.csr_matrix]:
        """Return the part's cells as they are written."""
        rows = self._rows(part)[: part.num_cells]
        if part.copied:
            return self._cells.copied(rows)
        pool = control_rows(self._store, self._experiment, part.dataset, part.context)
        return self._cells.made(part, rows, self._predicted(part, predicted), pool=pool)

    def _predicted(self, part: Part, predicted: Iterator[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """Take the part's cells from the stream of predicted cells, without the surplus of the last set."""
        left = part.num_cells
        while left:
            cells_CG = next(predicted)[:left]
            left -= len(cells_CG)
            if not np.isfinite(cells_CG).all():
                raise CheckpointError(
                    f"{part.file}: the model predicts values that are not finite; its training has diverged: "
                    "train again with a lower train.learning_rate"
                )
            yield cells_CG
            del cells_CG

    def _predict(self, part: Part, sets_BS: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the predictions of cells over all genes, in the order of their control cells."""
        rows = sets_BS.reshape(-1)
        output_CO = self._predictor.predict(sets_BS, target=self._label(part.target), context=part.context)
        if np.array_equal(self._run.output_genes, np.arange(len(self._run.genes))):
            cells_CG = output_CO
        else:
            cells_CG = np.zeros((len(rows), len(self._run.genes)), dtype=np.float32)
            if not self._from_head:
                cells_CG = self._store.log1p(rows)
            cells_CG[:, self._run.output_genes] = output_CO
        if self._store.measured_SG is not None:
            # genes that a panel did not measure stay 0 in cells made from its controls
            cells_CG[~self._store.measured_FG[self._store.file_codes[rows]]] = 0
        return cells_CG


_POLL_SECONDS = 0.5


def own_share(parts: Sequence[Part], *, rank: int, size: int) -> tuple[Part, ...]:
    """Return the parts of one process; all processes have about as many cells.

    >>> parts = [Part(name, "vcc", "H1", name, num) for name, num in (("A", 5), ("B", 9), ("C", 4), ("D", 1))]
    >>> [[part.target for part in own_share(parts, rank=rank, size=2)] for rank in range(2)]
    [['B', 'D'], ['A', 'C']]
    """
    loads, owner = [0] * size, {}
    for part in sorted(parts, key=lambda part: -part.num_cells):
        least = loads.index(min(loads))
        loads[least] += part.num_cells
        owner[part.file] = least
    return tuple(part for part in parts if owner[part.file] == rank)


def wait_for_others(out: Path, parts: Sequence[Part], maker: PartMaker, advance: Advance) -> None:
    """Wait until the parts of all other processes are complete."""
    pending = list(parts)
    while pending:
        for part in tuple(pending):
            # A manifest may be taken away between two looks at it.
            with suppress(CheckpointError):
                if maker.is_right(out, part):
                    pending.remove(part)
                    advance(part.num_cells, detail=part.target)
        time.sleep(_POLL_SECONDS if pending else 0)
