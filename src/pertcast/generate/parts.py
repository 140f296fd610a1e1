"""Makes one part after another with one model: sets of control cells in, one h5ad of predicted cells out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse

from pertcast.config import Experiment
from pertcast.data.features import PertFeatures
from pertcast.data.inputs import read_inputs
from pertcast.data.sets import generation_sets
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
from pertcast.files.h5ad import CsrWriter
from pertcast.generate.plan import Part, control_rows
from pertcast.models.checkpoint import Run
from pertcast.models.state import StateTransition
from pertcast.submission.controls import choose_controls

__all__ = ["PartMaker"]


class PartMaker:
    """Makes one part after another with one model."""

    def __init__(self, run: Run, store: Store, experiment: Experiment, features: PertFeatures, weights: str) -> None:
        self._run, self._store, self._experiment, self._features = run, store, experiment, features
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: StateTransition | None = None
        self.inputs = {"weights": weights, "store": store.fingerprint}
        missing = len(run.genes) - len(run.output_genes)
        if missing and experiment.generate.other_genes == "error":
            raise ConfigError(
                f"[generate] other_genes: the model predicts {len(run.output_genes):,} of {len(run.genes):,} genes; "
                'pass --set generate.other_genes="control" to copy the others from the control cells, or train with '
                'model.output = "genes"'
            )

    def _settings(self, part: Part) -> dict[str, object]:
        """Return all that the values of a part depend on beside weights and store."""
        generate, submission = self._experiment.generate, self._experiment.submission
        settings: dict[str, object] = {
            "seed": generate.seed,
            "controls_from": generate.controls_from,
            "scale": generate.scale,
            "other_genes": generate.other_genes,
            "context": part.context,
            "target": part.target,
            "num_cells": part.num_cells,
            "copied": part.copied,
            "season": submission.season,
        }
        if not part.copied:
            settings["feature"] = hashlib.sha256(self._feature(part.target).tobytes()).hexdigest()
        return settings

    def _feature(self, target: str) -> NDArray[np.float32]:
        season = self._experiment.submission.resolve()
        return self._features.of([self._store.control if target == season.control_label else target])

    def is_right(self, out: Path, part: Part) -> bool:
        """Return whether the part is there, whole, and made from what it would be made from now."""
        path = out / part.file
        if not path.is_file() or not manifest_path(path).is_file():
            return False
        same = read_manifest(path, kind="part").matches(inputs=self.inputs, config=self._settings(part))
        return same and not verify_artefact(path)

    def make(self, out: Path, part: Part) -> None:
        """Write one part and its manifest."""
        path = out / part.file
        path.parent.mkdir(exist_ok=True)
        remove_leftovers(path)
        manifest_path(path).unlink(missing_ok=True)
        rows, blocks = self._copied(part) if part.copied else self._predicted(part)
        with atomic_file(path) as temporary, CsrWriter(temporary, self._run.genes) as writer:
            for block in blocks:
                writer.append(block)
            writer.finish(self._obs(part, rows))
        write_manifest(path, Manifest("part", inputs=self.inputs, config=self._settings(part)))

    def _obs(self, part: Part, rows: NDArray[np.int64]) -> pd.DataFrame:
        season, store = self._experiment.submission.resolve(), self._store
        obs = pd.DataFrame({season.pert_column: pd.Categorical([part.target] * len(rows))})
        if season.context_column is not None:
            obs[season.context_column] = pd.Categorical([part.context] * len(rows))
        if store.batches:
            codes = store.batch_codes[rows]
            obs["batch"] = pd.Categorical([store.batches[code] if code >= 0 else "unknown" for code in codes])
        obs.index = obs.index.astype(str)
        return obs

    def _copied(self, part: Part) -> tuple[NDArray[np.int64], Iterator[sparse.csr_matrix]]:
        pool = control_rows(self._store, self._experiment, part.context)
        seed = self._experiment.generate.seed
        rows = choose_controls(pool, self._store.batch_codes[pool], num=part.num_cells, seed=seed)
        step = 1024
        return rows, (self._store.csr(rows[start : start + step]) for start in range(0, len(rows), step))

    def _predicted(self, part: Part) -> tuple[NDArray[np.int64], Iterator[sparse.csr_matrix]]:
        sets_NS = generation_sets(
            self._store,
            context=self._store.contexts.index(part.context),
            target=part.target,
            num_cells=part.num_cells,
            set_size=self._run.spec.set_size,
            seed=self._experiment.generate.seed,
            controls=control_rows(self._store, self._experiment, part.context),
        )
        return sets_NS.reshape(-1)[: part.num_cells], self._predict(part, sets_NS)

    def _predict(self, part: Part, sets_NS: NDArray[np.int64]) -> Iterator[sparse.csr_matrix]:
        left = part.num_cells
        for start in range(0, len(sets_NS), self._experiment.generate.sets_per_step):
            sets_BS = sets_NS[start : start + self._experiment.generate.sets_per_step]
            cells_CG = self._cells(part, sets_BS)[:left]
            left -= len(cells_CG)
            if not np.isfinite(cells_CG).all():
                raise CheckpointError(
                    f"{part.file}: the model predicts values that are not finite; its training has diverged: "
                    "train again with a lower train.learning_rate"
                )
            yield sparse.csr_matrix(cells_CG)

    @torch.inference_mode()
    def _cells(self, part: Part, sets_BS: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return (B * S, all genes) log1p values of predicted cells, in the order of their control cells."""
        run, store = self._run, self._store
        if self._model is None:
            self._model = run.model().to(self._device).eval()
        rows = sets_BS.reshape(-1)
        control_BSI = read_inputs(store, rows, source=self._experiment.model.input).reshape(*sets_BS.shape, -1)
        context = run.contexts.index(part.context) if part.context in run.contexts else -1
        prediction = self._model(
            self._tensor(control_BSI),
            self._tensor(self._feature(part.target)).expand(len(sets_BS), -1),
            self._tensor(store.batch_codes[rows].astype(np.int64).reshape(sets_BS.shape)),
            torch.full((len(sets_BS),), context, device=self._device),
        )
        output_CG: NDArray[np.float32] = prediction.log1p_BSG.flatten(0, 1).float().cpu().numpy()
        if len(run.output_genes) == len(run.genes):
            return output_CG
        cells_CG = store.log1p(rows)
        cells_CG[:, run.output_genes] = output_CG
        return cells_CG

    def _tensor(self, values: NDArray[np.generic]) -> torch.Tensor:
        # in torch's own, always equally aligned memory: matrix products may round by the alignment of their operands
        return torch.from_numpy(values).clone().to(self._device)
