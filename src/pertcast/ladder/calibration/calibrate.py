"""Choose the amplitude of effects and the residual scale of cells on held-out targets.

Candidates are compared by the official overall, relative to copies of control cells. It clips each metric at 0, so it
hides a mean worse than the controls'. Of amplitudes that score alike, the nearest to 1 is taken, and a note says if the
mean is worse.

Invariants: test cells are never read. A change is kept only if it gains more than a standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pertcast.config import rebuild_experiment
from pertcast.data.store import Store
from pertcast.errors import CheckpointError, ConfigError, DataError
from pertcast.files.artefacts import claimed, hash_file
from pertcast.generate.calibration import Calibration, save_calibration
from pertcast.ladder.calibration.unseen_targets import UnseenTargets, refit, unseen_targets
from pertcast.models.run_folder import WEIGHTS, open_run
from pertcast.progress import SILENT, Progress
from pertcast.stats.metrics import BEST, overall

AMPLITUDES = (0.0, 0.25, 0.5, 0.75, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
SLOPES = (-0.5, -0.25, 0.25, 0.5)
SPREADS = (0.6, 0.8, 1.2, 1.4)
_FEWEST = 4


@dataclass(frozen=True)
class _Choice:
    """One scaling and the targets' scores with it."""

    amplitude: float = 1.0
    slope: float = 0.0
    spread: float = 1.0
    scores: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 3)))


def calibrate(
    run_path: Path,
    *,
    store_path: Path | None = None,
    overrides: Sequence[str] = (),
    folds: int = 0,
    fold_steps: int | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Choose amplitude and residual scale on held-out targets, and store them in the run."""
    run = open_run(run_path)
    if not run.store_fingerprint:
        raise CheckpointError(
            f"{run_path}: it was imported, and nothing says which targets it was trained without; "
            "train a run with `pertcast train` to calibrate it"
        )
    experiment = rebuild_experiment(run.experiment, overrides, place=run_path / "run.json", command="calibrate")
    experiment = experiment.model_copy(
        update={"generate": experiment.generate.resolve("counts" if run.scale == "counts" else "log1p")}
    )
    if experiment.generate.cells == "nb_head":
        raise ConfigError(
            '[generate] cells: "nb_head" draws cells from the counts head, whose effects are not scaled; calibrate '
            "another way to make cells (donors)"
        )
    pairs = [(run_path, store_path or run.store_path)]
    if folds:
        pairs = refit(run_path, store_path or run.store_path, folds=folds, steps=fold_steps, progress=progress)
    cases: list[UnseenTargets] = []
    for path, place in pairs:
        fold, store = open_run(path), Store.open(place)
        if store.fingerprint != fold.store_fingerprint:
            raise CheckpointError(f"{place}: not the store that {path} was trained on; give that one with --store")
        cases += unseen_targets(fold, store, experiment, progress=progress)
    number = sum(len(case.parts) for case in cases)
    if number < _FEWEST:
        raise DataError(
            f"{run_path}: expected at least {_FEWEST} validation targets that their context did not train on, "
            f'got {number}; hold some out ([fewshot."dataset.cell_type"] val), or train again without some: --folds 5'
        )
    found = _search(cases, cells=experiment.generate.cells, weights=hash_file(run_path / WEIGHTS), progress=progress)
    with claimed(run_path):
        return save_calibration(run_path, found)


def _search(cases: Sequence[UnseenTargets], *, cells: str, weights: str, progress: Progress) -> Calibration:
    sizes = [case.sizes() for case in cases]
    reference = float(np.median([size for some in sizes for size in some]))
    base = _table([score for case in cases for score in case.copies()])
    tried: list[_Choice] = []
    spreads = SPREADS if cells in ("shift", "sparse") else ()
    most = 1 + len(AMPLITUDES) + 1 + len(SLOPES) + len(spreads)

    with progress.task("calibrate", most, "choices") as advance:

        def look(amplitude: float, slope: float, spread: float) -> _Choice:
            scaling = Calibration(amplitude, slope, reference, cells, spread, weights, 0)
            scores = [
                score
                for case, own in zip(cases, sizes, strict=True)
                for score in case.scores(
                    {part.target: scaling.of(size) for part, size in zip(case.parts, own, strict=True)}, spread=spread
                )
            ]
            tried.append(_Choice(amplitude, slope, spread, _table(scores)))
            advance(1)
            return tried[-1]

        none = best = look(1.0, 0.0, 1.0)
        best = _better(none, [look(amplitude, 0.0, 1.0) for amplitude in AMPLITUDES], base)
        if best is not none:
            best = _nearest(best, [choice for choice in tried if choice is not none], base)
        if best.amplitude:
            slopes = [look(best.amplitude, slope, 1.0) for slope in SLOPES]
            sloped = _better(best, slopes, base)
            if sloped is not best:
                gain, error = _gain(sloped, best, base)
                best = look(best.amplitude, sloped.slope * (1 - (error / gain) ** 2), 1.0)
        best = _better(best, [look(best.amplitude, best.slope, spread) for spread in spreads], base)
    _show(tried, base, progress)
    notes = _notes(none, best, base)
    found = Calibration(
        amplitude=best.amplitude,
        slope=best.slope,
        reference=reference,
        cells=cells,
        spread=best.spread,
        weights=weights,
        num_targets=len(none.scores),
        before=_named(none, base),
        after=_named(best, base),
        tried=tuple(
            {**_named(choice, base), "amplitude": choice.amplitude, "slope": choice.slope, "spread": choice.spread}
            for choice in tried
        ),
        notes=notes,
    )
    progress.note(f"{found}: " + "; ".join(notes))
    return found


def _table(scores: Sequence[dict[str, float]]) -> NDArray[np.float64]:
    """Return (targets, metrics of the overall)."""
    return np.array([[score[name] for name in BEST] for score in scores], dtype=np.float64)


def _means(scores: NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(BEST, scores.mean(0).tolist(), strict=True))


def _value(scores: NDArray[np.float64], base: NDArray[np.float64]) -> float:
    return overall(_means(scores), _means(base))


def _gain(choice: _Choice, other: _Choice, base: NDArray[np.float64]) -> tuple[float, float]:
    """Return the gain of one choice over another, and its jackknife standard error over targets."""

    def gain(kept: NDArray[np.int64]) -> float:
        return _value(choice.scores[kept], base[kept]) - _value(other.scores[kept], base[kept])

    every = np.arange(len(base))
    without = np.array([gain(np.delete(every, place)) for place in every])
    error = np.sqrt((len(every) - 1) / len(every) * np.square(without - without.mean()).sum())
    return gain(every), float(error)


def _better(now: _Choice, others: Sequence[_Choice], base: NDArray[np.float64]) -> _Choice:
    """Return the best choice if it gains more than a standard error, else the current one."""
    if not others:
        return now
    best = max(others, key=lambda choice: _value(choice.scores, base))
    gain, error = _gain(best, now, base)
    return best if gain > error else now


def _nearest(best: _Choice, others: Sequence[_Choice], base: NDArray[np.float64]) -> _Choice:
    """Return the choice nearest to amplitude 1 among those within a standard error of the best."""
    alike = []
    for choice in others:
        gain, error = _gain(best, choice, base)
        if choice is best or gain <= error:
            alike.append(choice)
    return min(alike, key=lambda choice: abs(np.log(max(choice.amplitude, 0.01))))


def _named(choice: _Choice, base: NDArray[np.float64]) -> dict[str, float]:
    means = _means(choice.scores)
    return {**means, "overall": overall(means, _means(base))}


def _show(tried: Sequence[_Choice], base: NDArray[np.float64], progress: Progress) -> None:
    shown: Callable[[float], str] = "{:.4f}".format
    rows = [[_label(choice), *(shown(value) for value in _named(choice, base).values())] for choice in tried]
    copies = [shown(value) for value in base.mean(0)] + [shown(0.0)]
    progress.table("Held-out targets", ["", *BEST, "overall"], [["copies of controls", *copies], *rows])


def _label(choice: _Choice) -> str:
    slope = f", slope {choice.slope:+.2f}" if choice.slope else ""
    return f"x {choice.amplitude:g}{slope}" + (f", spread {choice.spread:g}" if choice.spread != 1 else "")


def _notes(none: _Choice, best: _Choice, base: NDArray[np.float64]) -> tuple[str, ...]:
    if best is none:
        return (f"no change beats none by more than a standard error on {len(base)} held-out targets",)
    before, after = _named(none, base), _named(best, base)
    gain, error = _gain(best, none, base)
    each = ", ".join(f"{name} {before[name]:.4f} -> {after[name]:.4f}" for name in (*BEST, "overall"))
    notes = [
        f"on {len(base)} held-out targets {each}; the gain of {gain:.4f} ± {error:.4f} was chosen there, so it flatters"
    ]
    if after["mae"] > base.mean(0)[list(BEST).index("mae")]:
        notes.append("its MAE is worse than that of copies of controls, which the clip of the overall hides")
    return tuple(notes)
