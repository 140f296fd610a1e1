"""Check, before training, everything that could stop an experiment later.

It covers cells, split, scale, submission, features and disk space, from tables, lists and a few cells of each file, so
it takes seconds. All problems are reported at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np

from pertcast.config import Experiment
from pertcast.data.features import FeatureStore, load_features
from pertcast.data.features.load import genes_of
from pertcast.data.prepare import Survey, natural_log_factor, scale_evidence, survey, total_of_log1p
from pertcast.data.split import CodedCells, Split
from pertcast.errors import ConfigError, DataError, Problem, Problems
from pertcast.files.h5ad import open_h5ad
from pertcast.files.resources import require_space
from pertcast.files.scales import Scale, common_scale, log1p_totals
from pertcast.files.season_lists import read_targets
from pertcast.generate.plan import plan_parts, prediction_sources
from pertcast.progress import SILENT, Progress

_SAMPLED_VALUES = 1 << 20
_BYTES_IN_STORE = 6  # a column and a count, and again where highly variable genes are copied
_BYTES_IN_PREDICTION = 16  # a float32 value and its column, in the parts and in the prediction


def preflight(
    experiment: Experiment, *, out: Path | None = None, store: CodedCells | None = None, progress: Progress = SILENT
) -> None:
    """Raise one error with everything that would stop the experiment later."""
    problems = Problems()
    cells, scale = store, store.known_scale if store is not None else None
    with problems.collect():
        if cells is None:
            cells = found = survey(experiment)
            with problems.collect():
                scale, totals = _sampled_scale(experiment, found)
                if scale == "log1p":
                    with problems.collect():
                        total_of_log1p(totals, asked=experiment.prepare.target_sum)
            if out is not None and not (out / "store").exists():
                with problems.collect():
                    _require_space(experiment, found, out)
    targets: Sequence[str] = ()
    if experiment.submission.targets is not None:
        with problems.collect():
            targets = read_targets(experiment.submission.targets, experiment.submission.resolve()).targets
            if cells is not None:
                plan_parts(cells, experiment)
        with problems.collect():
            if scale == "log1p" and experiment.generate.reads_counts and store is None:
                place = f"[generate] scale = {experiment.generate.scale!r}, cells = {experiment.generate.cells!r}"
                message = "they need control cells in counts, and the data are log1p values"
                raise ConfigError(problems=[Problem(place, message, "give raw counts, or choose others")])
    elif cells is not None and (experiment.submission.context or experiment.submission.dataset):
        with problems.collect():
            prediction_sources(cells, experiment, experiment.submission.resolve())
    if cells is not None:
        with problems.collect():
            _check_features(experiment, cells, targets)
    if cells is not None and experiment.model.kind == "state":
        with problems.collect():
            _check_network(experiment, cells, scale)
    problems.raise_if_any()
    progress.note("checked before training: data, split, submission and features are consistent")


def _check_network(experiment: Experiment, cells: CodedCells, scale: Scale | None) -> None:
    """Refuse a network, loss or selection that cannot train on these cells."""
    from pertcast.models.spec import spec_for
    from pertcast.train.stage import require_losses

    require_losses(experiment)
    size = len(cells.genes)
    spec_for(
        experiment.model, num_genes=size, input_dim=size, output_dim=size, pert_dim=1, num_batches=1, num_contexts=1
    )
    if experiment.loss.nb and scale == "log1p":
        message = "the counts head learns from whole counts, and the data are log1p values"
        raise ConfigError(problems=[Problem("[loss] nb", message, "give raw counts, or set loss.nb to 0")])
    rows = cells.rows(split=Split.VAL)
    if experiment.train.select_by != "loss" and not (cells.pert_codes[rows] != cells.control_code).any():
        message = f'"{experiment.train.select_by}" is of validation perturbations, and there are none'
        remedy = 'list some as val in [fewshot], or set train.select_by = "loss"'
        raise ConfigError(problems=[Problem("[train] select_by", message, remedy)])


def _check_features(experiment: Experiment, cells: CodedCells, targets: Sequence[str]) -> None:
    config = experiment.features
    if experiment.model.kind in ("control", "mean"):
        return
    if config.kind != "coexpression":
        # "nearest" compares values of cells, which are not read yet; that there are features to fill in from is checked
        plain = config.model_copy(update={"missing": "mean"}) if config.missing == "nearest" else config
        load_features(plain, cast("FeatureStore", cells), targets=targets)
        return
    known = {*cells.genes, cells.control}
    lost = [
        label
        for label in dict.fromkeys((*cells.perts, *targets))
        if label not in known
        and not (
            known.issuperset(genes := genes_of(label, config.separator, control=cells.control))
            and (config.combine != "none" or len(genes) == 1)
        )
    ]
    if lost and config.missing == "error":
        remedy = 'give another features.kind, or fill it in with features.missing = "mean"'
        raise DataError(problems=[Problem(repr(label), "it is not in the gene list", remedy) for label in lost])


def _sampled_scale(experiment: Experiment, found: Survey) -> tuple[Scale | None, np.ndarray]:
    """Return the scale of the first cells of all files, or ``None``, and their log1p totals."""
    evidence, totals = [], []
    for (dataset, path, _), gene_map in zip(found.files, found.gene_maps, strict=True):
        with open_h5ad(path, layer=experiment.columns.in_dataset(dataset).layer) as reader:
            if reader.layout == "csc":
                continue  # it has no first cells without sorting all of them
            _, block = next(reader.chunks(max_values=_SAMPLED_VALUES))
            factor = natural_log_factor(reader, block)
            if factor != 1:
                block.data *= block.data.dtype.type(factor)
            item = scale_evidence(reader)
            item.add_csr(block)
            if not item.ambiguous:
                evidence.append(item)
                totals.append(log1p_totals(gene_map.apply(block)))
    if not evidence:
        return None, np.zeros(0)
    return common_scale(evidence, asked=experiment.prepare.scale), np.concatenate(totals)


def _require_space(experiment: Experiment, found: Survey, out: Path) -> None:
    stored = 0
    for dataset, path, _ in found.files:
        with open_h5ad(path, layer=experiment.columns.in_dataset(dataset).layer) as reader:
            stored += reader.num_stored
    predicted = experiment.submission.resolve().max_cells if experiment.submission.targets is not None else 0
    values = stored / max(len(found.split), 1) * predicted
    needed = stored * _BYTES_IN_STORE + values * _BYTES_IN_PREDICTION
    require_space(out / "store", int(needed), what="the store and the prediction")
