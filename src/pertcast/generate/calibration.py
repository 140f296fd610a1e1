"""The calibration of a run, and the predictor that scales effects by it.

Invariants: a calibration belongs to the weights that it was made with. It is listed in the run's manifest, so a changed
one is noticed when the run is opened. Each set is scaled by itself, so cells do not depend on the batch size.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pertcast.config import Experiment, GenerateConfig
from pertcast.data.store import Store
from pertcast.errors import CheckpointError, ConfigError
from pertcast.files.artefacts import hash_file, read_json, read_manifest, write_json, write_manifest
from pertcast.generate.predict import Predictor
from pertcast.models.run_folder import WEIGHTS, Run


def amplify(
    predicted_log1p_SG: NDArray[np.float32],
    control_log1p_SG: NDArray[np.float32],
    amplitude: float,
    *,
    ceiling: float = float("inf"),
) -> NDArray[np.float32]:
    """Scale the mean effect of predicted cells by `amplitude`, not below 0; zeros stay 0.

    >>> amplify(np.array([[0.0, 1.0], [4.0, 1.0]], dtype="f4"), np.array([[1.0, 2.0]] * 2, dtype="f4"), 2.0).tolist()
    [[0.0, 0.0], [6.0, 0.0]]
    """
    if amplitude == 1:
        return predicted_log1p_SG
    control_G = control_log1p_SG.mean(axis=0, dtype=np.float64)
    mean_G = predicted_log1p_SG.mean(axis=0, dtype=np.float64)
    wanted_G = np.maximum(control_G + amplitude * (mean_G - control_G), 0)
    rises_G = (mean_G < wanted_G) & (mean_G < control_G)
    factor_G = np.divide(wanted_G, mean_G, out=np.ones_like(mean_G), where=~rises_G & (mean_G > 0))
    share_G = np.divide(wanted_G - mean_G, control_G, out=np.zeros_like(mean_G), where=rises_G)
    amplified: NDArray[np.float32] = predicted_log1p_SG * factor_G.astype(np.float32)
    if rises_G.any():
        amplified += control_log1p_SG * share_G.astype(np.float32)
    return np.minimum(amplified, np.maximum(predicted_log1p_SG, np.float32(ceiling)))


def effect_size(predicted_log1p_SG: NDArray[np.float32], control_log1p_SG: NDArray[np.float32]) -> float:
    """Return the root mean square over genes of the mean effect.

    >>> effect_size(np.array([[2.0, 2.0]], dtype="f4"), np.zeros((1, 2), dtype="f4"))
    2.0
    """
    effect_G = predicted_log1p_SG.mean(axis=0, dtype=np.float64) - control_log1p_SG.mean(axis=0, dtype=np.float64)
    return float(np.sqrt(np.square(effect_G).mean()))


CALIBRATION = "calibration.json"
_LARGEST_CHANGE = 4.0
_LARGEST_TOTAL = 1e6


@dataclass(frozen=True)
class Calibration:
    """The scaling of a run's effects, and the residual scale of its cells."""

    amplitude: float  # Of all effects
    # A target whose predicted effect has the size s has the amplitude ``amplitude * (s / reference) **
    # slope``; the second factor is at most 4 and at least a quarter
    slope: float
    reference: float
    cells: str  # The way of making cells that it was chosen for, and the spread for ``generate.residual_scale``
    spread: float
    weights: str  # Hash of the run's weights
    num_targets: int  # How many held-out targets it was chosen on
    before: dict[str, float] = field(default_factory=dict)  # Mean of each metric on these targets, without and with it
    after: dict[str, float] = field(default_factory=dict)
    tried: tuple[dict[str, float], ...] = ()  # Every choice that was looked at, with its scores
    notes: tuple[str, ...] = ()  # What was done, in sentences

    def of(self, size: float) -> float:
        """Return the amplitude for a target with this effect size."""
        if not self.slope or not size or not self.reference:
            return self.amplitude
        change = (size / self.reference) ** self.slope
        return self.amplitude * float(np.clip(change, 1 / _LARGEST_CHANGE, _LARGEST_CHANGE))

    @property
    def fingerprint(self) -> str:
        """A hash of everything that changes cells."""
        values = [self.amplitude, self.slope, self.reference, self.spread, self.cells, self.weights]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def __str__(self) -> str:
        """Describe the scaling."""
        own = f" x (predicted size / {self.reference:.3g}) ^ {self.slope:+.2f}" if self.slope else ""
        spread = f", spread {self.spread:g}" if self.spread != 1 else ""
        return f"effects x {self.amplitude:.3g}{own}{spread}"


def save_calibration(run_path: Path, calibration: Calibration) -> Path:
    """Write a calibration into a run's folder and its manifest, replacing an earlier one."""
    manifest = read_manifest(run_path, kind="run")
    path = run_path / CALIBRATION
    write_json(path, asdict(calibration))
    write_manifest(run_path, replace(manifest, files={**manifest.files, CALIBRATION: hash_file(path)}))
    return path


def open_calibration(run_path: Path) -> Calibration:
    """Read the calibration of a run."""
    remedy = f"run `pertcast calibrate {run_path}`, or leave generate.calibrated away"
    if CALIBRATION not in read_manifest(run_path, kind="run").files:
        raise CheckpointError(f"{run_path}: it is not calibrated; {remedy}")
    raw: dict[str, Any] = read_json(run_path / CALIBRATION)
    try:
        found = Calibration(**{**raw, "tried": tuple(raw["tried"]), "notes": tuple(raw["notes"])})
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{run_path / CALIBRATION}: no calibration of this version ({error}); {remedy}") from None
    if found.weights != hash_file(run_path / WEIGHTS):
        raise CheckpointError(f"{run_path / CALIBRATION}: it was made for other weights; {remedy}")
    return found


def calibrated(run: Run, experiment: Experiment) -> tuple[Calibration | None, Experiment]:
    """Return the run's calibration if ``generate.calibrated`` asks for it, and the adjusted experiment."""
    generate: GenerateConfig = experiment.generate
    if not generate.calibrated:
        return None, experiment
    found = open_calibration(run.path)
    if found.cells != generate.cells:
        raise ConfigError(
            f"{run.path}: it was calibrated for generate.cells = {found.cells!r}, got {generate.cells!r}; "
            f"calibrate it with --set generate.cells={generate.cells!r}"
        )
    return found, experiment.model_copy(
        update={"generate": generate.model_copy(update={"residual_scale": found.spread})}
    )


def largest_log1p(store: Store) -> float:
    """Return the largest possible log1p value: that of the total of a cell."""
    return float(np.log1p(store.target_sum or _LARGEST_TOTAL))


class CalibratedPredictor:
    """Scale the effects of targets; control cells are unchanged."""

    def __init__(
        self, predictor: Predictor, store: Store, calibration: Calibration, *, output_genes: NDArray[np.int64]
    ) -> None:
        self._predictor, self._store, self._calibration = predictor, store, calibration
        self._genes = None if len(output_genes) == len(store.genes) else output_genes

    def predict(self, rows_BS: NDArray[np.int64], *, target: str, context: str) -> NDArray[np.float32]:
        """Return (B * S, output genes) log1p values."""
        predicted_CO = self._predictor.predict(rows_BS, target=target, context=context)
        if target == self._store.control:
            return predicted_CO
        size = rows_BS.shape[1]
        for number, rows_S in enumerate(rows_BS):
            cells = slice(number * size, (number + 1) * size)
            control_SO = self._store.log1p(rows_S, genes=self._genes)
            amplitude = self._calibration.of(effect_size(predicted_CO[cells], control_SO))
            predicted_CO[cells] = amplify(
                predicted_CO[cells], control_SO, amplitude, ceiling=largest_log1p(self._store)
            )
        return predicted_CO
