"""Generate the planned cells of each target from a run: one part file for each target.

Invariants: every set has the model's length; the last one is filled and its surplus dropped. Controls are of the
target's context. A part depends on the seed, its context and its target alone, never on the other targets. A valid part
is not made again, and no half-written part has its final name.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pertcast.config import Experiment, GenerateConfig, differences, rebuild_experiment
from pertcast.data.features import PertFeatures, load_features, open_features
from pertcast.data.store import Store
from pertcast.errors import CheckpointError, DataError
from pertcast.files.artefacts import (
    MANIFEST,
    Manifest,
    Provenance,
    atomic_file,
    claimed,
    clean,
    hash_file,
    locked,
    manifest_path,
    read_manifest,
    write_json,
    write_manifest,
)
from pertcast.files.resources import reused_memory
from pertcast.files.season_lists import write_genes
from pertcast.generate.calibration import calibrated
from pertcast.generate.parts import PartMaker, own_share, wait_for_others
from pertcast.generate.plan import Part, Plan, plan_parts
from pertcast.generate.predict import bind, is_imported, match_total
from pertcast.models.run_folder import WEIGHTS, Run, open_run
from pertcast.processes import launched, run_processes
from pertcast.progress import SILENT, Progress

__all__ = ["Part", "Plan", "generate", "generate_share", "plan_parts"]

logger = logging.getLogger(__name__)

_HAS = {"counts": "counts", "log1p": "log1p values and no counts"}


def generate(
    run_path: Path,
    out: Path,
    *,
    experiment: Experiment | None = None,
    store_path: Path | None = None,
    overrides: Sequence[str] = (),
    devices: int = 1,
    progress: Progress = SILENT,
) -> Path:
    """Generate the requested number of cells for each target.

    Parameters
    ----------
    run_path
        A folder that :func:`pertcast.train.train` wrote.
    out
        The folder of parts; parts in it that are right are kept.
    experiment
        Whose ``[generate]`` and ``[submission]`` apply; default: those that the run was trained with.
    store_path
        The store, if it has moved since training.
    overrides
        ``section.key=value`` on top of the experiment that the run was trained with.
    devices
        Processes to start on this machine, each with its own GPU where there are some. Targets are shared out over
        them, as over those that torchrun or srun has started; the files are the same.

    Returns
    -------
    `out`, with one ``context/target.h5ad`` each (log1p, float32, CSR), ``plan.json``, ``genes.csv`` and a manifest.

    Raises
    ------
    PertcastError
        If the run, the store, the targets or the features do not fit one another.
    """
    ranks = launched()
    if ranks is None and devices > 1:
        asked_for = None if experiment is None else experiment.as_json()
        paths = {"run": str(run_path), "out": str(out), "store": None if store_path is None else str(store_path)}
        job = {**paths, "experiment": asked_for, "overrides": list(overrides)}
        run_processes("pertcast.generate:generate_share", job, num=devices, progress=progress)
        return out
    run = open_run(run_path)
    trained = rebuild_experiment(run.experiment, overrides, place=run_path / "run.json", command="generate")
    if experiment is not None and not is_imported(run):
        _require_same_training(run, experiment)
    asked = experiment or trained
    experiment = trained.model_copy(update={"generate": asked.generate, "submission": asked.submission})
    store = _open_store(run, run_path, store_path)
    chosen = experiment.generate.resolve(store.scale)
    if chosen != experiment.generate:
        progress.note(f'generate.cells = "auto": {chosen.cells}, since the store has {_HAS[store.scale]}')
        experiment = experiment.model_copy(update={"generate": chosen})
    total_notes: list[str] = []
    if is_imported(run):
        run = bind(run, store)
        store, total_notes = match_total(run, store)
    plan = plan_parts(store, experiment)
    plan = dataclasses.replace(plan, notes=(*plan.notes, *total_notes))
    features = _features(run, run_path, experiment, store, plan)
    plan = _with_notes(plan, experiment, features, run, store)
    weights = read_manifest(run_path, kind="run").files[WEIGHTS]  # opening the run has checked it
    maker = PartMaker(run, store, experiment, features, weights)
    _show(plan, progress)
    _require_parts(out)
    if ranks is None:
        with claimed(out):
            _begin(out, plan, experiment)
            _make_parts(out, plan.parts, maker, progress)
            _finish(out, plan, experiment, run, maker)
        return out
    own = own_share(plan.parts, rank=ranks.rank, size=ranks.size)
    with locked(out if ranks.rank == 0 else out.with_name(f"{out.name}.{ranks.rank}")):
        if ranks.rank == 0 or not (out / "plan.json").is_file():
            _begin(out, plan, experiment)
        _make_parts(
            out, own, maker, progress, others=[part for part in plan.parts if part not in own and not ranks.rank]
        )
        if ranks.rank == 0:
            clean(out)
            _finish(out, plan, experiment, run, maker)
    return out


def generate_share(job: Mapping[str, Any], progress: Progress) -> None:
    """Make the parts of one of the processes that :func:`generate` started."""
    out, experiment = Path(job["out"]), job["experiment"]
    generate(
        Path(job["run"]),
        out,
        experiment=None if experiment is None else rebuild_experiment(experiment, place=out),
        store_path=None if job["store"] is None else Path(job["store"]),
        overrides=job["overrides"],
        progress=progress,
    )


def _require_parts(out: Path) -> None:
    # other processes write under hidden names before there is a plan
    seen = out.is_file() or (out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()))
    if seen and not (out / "plan.json").is_file():
        raise DataError(f"{out}: it exists and holds no parts; give another --out, or remove it first")


def _begin(out: Path, plan: Plan, experiment: Experiment) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)
    write_json(out / "plan.json", _plan_json(plan, experiment))


def _make_parts(
    out: Path, parts: Sequence[Part], maker: PartMaker, progress: Progress, *, others: Sequence[Part] = ()
) -> None:
    """Make the missing parts, and wait for those of other processes."""
    todo = [part for part in parts if not maker.is_right(out, part)]
    total = sum(part.num_cells for part in (*parts, *others))
    done = sum(part.num_cells for part in parts) - sum(part.num_cells for part in todo)
    with reused_memory(), progress.task("generate", total, "cells", done=done) as advance:
        maker.make(out, todo, done=lambda part: advance(part.num_cells, detail=part.target))
        wait_for_others(out, others, maker, advance)


def _require_same_training(run: Run, experiment: Experiment) -> None:
    """Refuse an experiment whose data, model or loss differ from the run's."""
    keys = [
        "training",
        "zeroshot",
        "fewshot",
        "columns",
        "prepare",
        "model",
        "loss",
        "features.kind",
        "features.combine",
    ]
    recorded = rebuild_experiment(run.experiment, place=run.path / "run.json").as_json()
    problems = differences(recorded, experiment.as_json(), keys, what="the run was trained")
    if problems:
        raise CheckpointError(
            f"{run.path} was trained with other settings; train again with this experiment, or change it back",
            problems=problems,
        )


def _open_store(run: Run, run_path: Path, store_path: Path | None) -> Store:
    if is_imported(run):
        if store_path is None:
            raise CheckpointError(
                f"{run_path}: it was imported and has no store to take control cells from; "
                "make one of your cells with `pertcast prepare`, and give it with --store"
            )
        return Store.open(store_path)
    store = Store.open(store_path or run.store_path)
    if store.fingerprint != run.store_fingerprint:
        raise CheckpointError(
            f"{store.path}: not the store that {run_path} was trained on (its manifest differs); "
            "give that store with --store, or train again"
        )
    return store


def _features(run: Run, run_path: Path, experiment: Experiment, store: Store, plan: Plan) -> PertFeatures:
    """Return features of every target: the run's own, or the file's for targets that the run has not seen."""
    kept = open_features(run_path / "features")
    targets = tuple(dict.fromkeys(part.target for part in plan.parts if part.target != plan.season.control_label))
    if set(targets) <= set(kept.names):
        return kept
    if is_imported(run):
        kept.of(targets)  # names every target that the network does not know
    if kept.kind == "none":
        more = tuple(target for target in targets if target not in kept.names)
        nothing = np.zeros((len(kept.names) + len(more), 0), dtype=np.float32)
        return dataclasses.replace(kept, names=(*kept.names, *more), matrix=nothing)
    features = load_features(experiment.features, store, targets=targets)
    if not np.array_equal(features.of(store.perts), kept.of(store.perts)):
        raise CheckpointError(
            f"{run_path}: {features.source} gives its training perturbations other features than it was trained with; "
            "give the file of the training with --set features.path=..., or train again"
        )
    return features


def _with_notes(plan: Plan, experiment: Experiment, features: PertFeatures, run: Run, store: Store) -> Plan:
    """Return the plan with a note on everything that the user asked for or should know."""
    notes = list(plan.notes)
    filled = {part.target: features.filled[part.target] for part in plan.parts if part.target in features.filled}
    if filled:
        some = ", ".join(f"{target} ({how})" for target, how in list(filled.items())[:5])
        more = f" and {len(filled) - 5} more" if len(filled) > 5 else ""
        notes.append(
            f"{len(filled)} target(s) have no feature of their own; filled in as asked for with "
            f"features.missing = {experiment.features.missing!r}: {some}{more}"
        )
    calibration, _ = calibrated(run, experiment)
    if calibration is not None:
        notes.append(f"calibrated on {calibration.num_targets} held-out targets: {calibration}")
    notes += _how_made(experiment.generate)
    for dataset in sorted({part.dataset for part in plan.parts}):
        files = np.unique(store.file_codes[store.dataset_codes == store.datasets.index(dataset)])
        lacking = int((~store.measured_FG[files]).any(axis=0).sum())
        if lacking:
            notes.append(f"{lacking:,} genes that {dataset} did not measure are 0 in cells made from its control cells")
    others = len(run.genes) - len(run.output_genes)
    if others:
        notes.append(f"{others:,} genes that the model does not predict are copied from control cells, as asked for")
    return dataclasses.replace(plan, notes=tuple(notes))


def _how_made(generate: GenerateConfig) -> list[str]:
    """Describe the cells if they are not the model's own."""
    ways = {
        "donors": "real control cells, re-weighted gene by gene to the predicted mean",
        "negative_binomial": "drawn around the predicted mean, with the control cells' dispersion and depth",
        "nb_head": "drawn from what the counts head says, at the control cells' depths",
        "shift": "control cells moved to the predicted mean",
        "sparse": "control cells moved to the predicted mean, zeros of rarely seen genes left alone",
    }
    notes = [f"cells are {ways[generate.cells]} (generate.cells)"] if generate.cells in ways else []
    if generate.subtract_control_prediction:
        notes.append(
            "effects are relative to the model's own prediction of the control condition "
            "(generate.subtract_control_prediction)"
        )
    return notes


def _show(plan: Plan, progress: Progress) -> None:
    rows = [[row.target, f"{row.asked:,}", f"{row.gets:,}"] for row in plan.budget.rows]
    copied = any(part.copied for part in plan.parts)
    if plan.budget.num_controls:
        how = "copied" if copied else "predicted"
        rows.append([f"{plan.season.control_label} ({how})", "", f"{plan.budget.num_controls:,}"])
    rows.append(["all", "", f"{plan.budget.total:,} of at most {plan.budget.cap:,}"])
    progress.table("The plan", ["target", "cells asked for", "cells"], rows)
    for note in plan.notes:
        progress.note(note)


def _plan_json(plan: Plan, experiment: Experiment) -> dict[str, object]:
    season = plan.season
    return {
        "season": season.name,
        "rules": dict(experiment.submission.rules),
        "pert_column": season.pert_column,
        "control_label": season.control_label,
        "context_column": season.context_column,
        "scale": experiment.generate.scale,
        "alpha": str(plan.budget.alpha_fraction),
        "num_controls": plan.budget.num_controls,
        "notes": list(plan.notes),
        "parts": [
            {
                "file": part.file,
                "target": part.target,
                "dataset": part.dataset,
                "context": part.context,
                "num_cells": part.num_cells,
            }
            for part in plan.parts
        ],
    }


def _finish(out: Path, plan: Plan, experiment: Experiment, run: Run, maker: PartMaker) -> None:
    """Write the gene list and the manifest; drop parts of an earlier plan."""
    with atomic_file(out / "genes.csv") as temporary:
        write_genes(temporary, run.genes)
    wanted = {out / part.file for part in plan.parts}
    files = {"plan.json": hash_file(out / "plan.json"), "genes.csv": hash_file(out / "genes.csv")}
    for path in sorted(out.glob("*/*.h5ad")):
        if path not in wanted:
            path.unlink()
            manifest_path(path).unlink(missing_ok=True)
            logger.info("removed %s, a part of an earlier plan", path)
    for part in plan.parts:
        files[part.file] = next(iter(read_manifest(out / part.file).files.values()))
    origin = Provenance(
        weights=maker.inputs["weights"],
        run=str(run.path.absolute()),
        step=run.step,
        store=maker.inputs["store"],
        experiment=experiment.as_json(),
    )
    facts = {"cells": plan.budget.total, "scale": experiment.generate.scale, "target_sum": run.target_sum}
    facts |= origin.as_facts()
    manifest = Manifest(
        "parts", inputs=maker.inputs, config=experiment.as_json(), files=files, facts=facts, notes=plan.notes
    )
    write_manifest(out, manifest)
