"""Join parts into one prediction: CSR float32, the genes of the list, the labels of the plan.

Invariants: parts are joined in the order of ``plan.json``, so equal parts give equal bytes. Every part is compared with
the plan before anything is written. Memory holds a block of one part at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pertcast.errors import CheckpointError, DataError, Problem, SubmissionError
from pertcast.files.artefacts import (
    Manifest,
    atomic_file,
    claimed,
    hash_file,
    hash_files,
    is_current,
    origin_facts,
    read_json,
    read_manifest,
    require_replaceable,
    write_manifest,
)
from pertcast.files.h5ad import open_h5ad
from pertcast.files.h5ad_writer import CsrWriter
from pertcast.files.resources import describe_write_error, require_space
from pertcast.files.season_lists import read_written_genes
from pertcast.progress import SILENT, Progress

PLAN = "plan.json"
GENES = "genes.csv"
_BATCH = "batch"
_AGAIN = "run `pertcast generate` again; it keeps the parts that are right"


@dataclass(frozen=True)
class _Part:
    file: str
    target: str
    context: str
    num_cells: int


@dataclass(frozen=True)
class _Plan:
    season: str
    rules: dict[str, Any]
    pert_column: str
    context_column: str | None
    control_label: str
    scale: str
    parts: tuple[_Part, ...]
    notes: tuple[str, ...]


def assemble(parts: Path, out: Path, *, force: bool = False, progress: Progress = SILENT) -> Path:
    """Join the parts of ``pertcast generate`` into one prediction.

    Parameters
    ----------
    parts
        The folder with ``plan.json``, ``genes.csv`` and a file for each part.
    out
        The h5ad to write: X CSR float32; obs ``target_gene`` (and the context, and ``batch`` where all parts have one),
        cells named "0", "1", ...; var just the genes. A file that is there and current is kept.
    force
        Whether to replace a file at `out` that pertcast did not write.

    Raises
    ------
    SubmissionError
        With every part that is missing or not what the plan says; nothing is written then.
    DataError
        If `out` is not pertcast's.
    """
    plan = _read_plan(parts / PLAN)
    genes = read_written_genes(parts / GENES)
    missing = [part for part in plan.parts if not (parts / part.file).is_file()]
    if missing:
        problems = [
            Problem(str(parts / part.file), f"the part of {part.target!r} is missing", _AGAIN) for part in missing
        ]
        raise SubmissionError(f"{parts}: {len(missing)} of {len(plan.parts)} parts are missing", problems=problems)
    try:
        with claimed(out) as interrupted:
            _assemble(
                parts,
                out,
                plan,
                genes,
                progress,
                allowed=lambda: require_replaceable(out, force=force, interrupted=interrupted),
            )
    except OSError as error:
        raise SubmissionError(describe_write_error(out, error)) from error
    return out


def _assemble(
    parts: Path, out: Path, plan: _Plan, genes: Sequence[str], progress: Progress, *, allowed: Callable[[], None]
) -> None:
    names = (PLAN, GENES, *(part.file for part in plan.parts))
    inputs = dict(zip(names, hash_files([parts / name for name in names]), strict=True))
    config = {"season": plan.season, "rules": plan.rules}
    if is_current(out, kind="prediction", inputs=inputs, config=config):
        progress.note(f"{out} is up to date")
        return
    allowed()
    problems = [
        *_changed(parts, inputs),
        *(found for part in plan.parts for found in _examine(parts, part, plan, genes)),
    ]
    if problems:
        raise SubmissionError(f"{parts}: {len(problems)} problem(s) in the parts", problems=problems)
    controls = sum(part.num_cells for part in plan.parts if part.target == plan.control_label)
    facts = {
        "cells": sum(part.num_cells for part in plan.parts),
        "controls": controls,
        "targets": len({part.target for part in plan.parts} - {plan.control_label}),
        "scale": plan.scale,
        **origin_facts(read_manifest(parts).facts),
    }
    require_space(out, sum((parts / part.file).stat().st_size for part in plan.parts), what="the prediction")
    with atomic_file(out) as temporary:
        _join(parts, plan, genes, temporary, progress)
        files = {out.name: hash_file(temporary)}
        # before the file takes its name: a manifest that does not fit its file is found out, the other way round too
        manifest = Manifest("prediction", inputs=inputs, config=config, files=files, facts=facts, notes=plan.notes)
        write_manifest(out, manifest)


def _read_plan(path: Path) -> _Plan:
    try:
        raw = read_json(path)
        parts = tuple(
            _Part(str(part["file"]), str(part["target"]), str(part["context"] or ""), int(part["num_cells"]))
            for part in raw["parts"]
        )
        plan = _Plan(
            season=str(raw["season"]),
            rules=dict(raw["rules"]),
            pert_column=str(raw["pert_column"]),
            context_column=raw["context_column"],
            control_label=str(raw["control_label"]),
            scale=str(raw["scale"]),
            parts=parts,
            notes=tuple(raw.get("notes", ())),
        )
    except CheckpointError as error:
        raise SubmissionError(f"{error} (give the folder that `pertcast generate` wrote)") from None
    except (KeyError, TypeError, ValueError) as error:
        raise SubmissionError(f"{path}: not a plan of pertcast ({error!r}); {_AGAIN}") from None
    folder = path.parent.resolve()
    problems = [
        Problem(str(path), f"part {part.file!r} is outside the folder", _AGAIN)
        for part in parts
        if not (folder / part.file).resolve().is_relative_to(folder)
    ]
    if not parts:
        problems.append(Problem(str(path), "it has no parts", _AGAIN))
    if problems:
        raise SubmissionError(problems=problems)
    return plan


def _changed(parts: Path, inputs: Mapping[str, str]) -> list[Problem]:
    """Return the files that differ from the folder's manifest; a folder without one is unfinished."""
    try:
        manifest = read_manifest(parts, kind="parts")
    except CheckpointError as error:
        return [Problem(str(parts), f"its manifest cannot be read, so it was not finished ({error})", _AGAIN)]
    return [
        Problem(str(parts / name), "its content is not what the manifest says", f"remove the file and {_AGAIN}")
        for name, digest in inputs.items()
        if manifest.files.get(name, digest) != digest
    ]


def _examine(parts: Path, part: _Part, plan: _Plan, genes: Sequence[str]) -> list[Problem]:
    """Return how a part differs from the plan; its values are read later."""
    path = parts / part.file
    wanted = {plan.pert_column: part.target} | ({plan.context_column: part.context} if plan.context_column else {})
    problems = []
    try:
        with open_h5ad(path) as reader:
            if reader.genes != tuple(genes):
                problems.append(Problem(f"{path}, var_names", f"not the {len(genes):,} genes of {GENES}", _AGAIN))
            if reader.num_cells != part.num_cells:
                message = f"expected {part.num_cells:,} cells, got {reader.num_cells:,}"
                problems.append(Problem(str(path), message, _AGAIN))
            for column, label in wanted.items():
                values = reader.obs(column)
                found = sorted({str(values.categories[code]) if code >= 0 else "" for code in np.unique(values.codes)})
                if found != [label] and reader.num_cells:
                    message = f"expected the label {label!r} in every cell, got {', '.join(map(repr, found))}"
                    problems.append(Problem(f"{path}, obs[{column!r}]", message, _AGAIN))
    except DataError as error:
        problems += error.problems or [Problem(str(path), str(error), _AGAIN)]
    return problems


def _join(parts: Path, plan: _Plan, genes: Sequence[str], temporary: Path, progress: Progress) -> None:
    batches: list[pd.Categorical] = []
    total = sum(part.num_cells for part in plan.parts)
    with progress.task("assemble", total, "cells") as advance, CsrWriter(temporary, genes) as writer:
        for part in plan.parts:
            with open_h5ad(parts / part.file) as reader:
                if _BATCH in reader.obs_columns:
                    batches.append(reader.obs(_BATCH))
                for _, block in reader.chunks():
                    writer.append(block)
                    advance(block.shape[0], detail=part.target)
        writer.finish(_obs(plan, batches))


def _obs(plan: _Plan, batches: Sequence[pd.Categorical]) -> pd.DataFrame:
    """Return the labels of all cells, and batches if every part has them."""
    sizes = [part.num_cells for part in plan.parts]
    columns = {plan.pert_column: pd.Categorical(np.repeat([part.target for part in plan.parts], sizes))}
    if plan.context_column:
        columns[plan.context_column] = pd.Categorical(np.repeat([part.context for part in plan.parts], sizes))
    if len(batches) == len(plan.parts):
        columns[_BATCH] = pd.Categorical(np.concatenate([np.asarray(values, dtype=object) for values in batches]))
    return pd.DataFrame(columns, index=pd.RangeIndex(sum(sizes)).astype(str))
