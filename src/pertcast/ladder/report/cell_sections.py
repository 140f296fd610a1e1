"""The parts of the page that need cells: effect sizes, principal components, top DE genes, volcanoes.

What is measured comes from the store of the run (training cells, and those put aside), or from a file of real cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pertcast.data.store import Split, Store
from pertcast.errors import CheckpointError, DataError
from pertcast.files.artefacts import read_manifest
from pertcast.ladder.report.figures import effect_sizes, plane
from pertcast.ladder.report.figures_of_genes import heatmap, volcano
from pertcast.ladder.report.gather import Material
from pertcast.ladder.report.html import Section, figure, paragraph, section, unordered
from pertcast.ladder.report.measure import Effects, Plane, agreement, de_tables, effects, fit_plane, with_controls
from pertcast.ladder.report.sample import Cells, Group, Limits, sample_h5ad, sample_store
from pertcast.progress import Progress
from pertcast.seasons import Season, season
from pertcast.stats.de import FDR, DeTable
from pertcast.stats.draws import generator

__all__ = ["cell_sections"]

_TITLES = (("effects", "Effect sizes"), ("cells", "Cells"), ("genes", "Top DE genes"), ("volcano", "Volcano"))
_GENES_SHOWN = 40
_GROUPS_SHOWN = 60
_VOLCANO_POINTS = 40_000
_PLANE_POINTS = 900


@dataclass(frozen=True, eq=False)
class _Sides:
    """Predicted cells, what is measured beside them, and the plane of the training cells."""

    predicted: Cells
    measured: dict[str, Cells]
    plane: Plane | None

    @property
    def best(self) -> Cells | None:
        """The measured cells to set beside the predicted ones: real ones where they are given."""
        return self.measured.get("real") or self.measured.get("training") or self.measured.get("held out")


def cell_sections(material: Material, *, truth: Path | None, progress: Progress) -> list[Section]:
    """Return the parts that need cells; where cells are missing each says what makes them."""
    if material.prediction is None:
        said = paragraph("No prediction is here; `pertcast generate` and `pertcast assemble` make one.")
        return [section(name, title, said) for name, title in _TITLES]
    sides = _read(material, truth, progress)
    with progress.task("compute", 3, "parts") as advance:
        predicted = effects(sides.predicted)
        measured = {name: effects(cells) for name, cells in sides.measured.items()}
        advance(1, "effects")
        tables = {"predicted": de_tables(sides.predicted)}
        if sides.best is not None:
            tables[sides.best.title] = de_tables(sides.best)
        advance(1, "differential expression")
        parts = [
            _effect_section(predicted, measured),
            _plane_section(sides),
            _gene_section(predicted, measured.get(sides.best.title) if sides.best else None, tables),
            _volcano_section(tables, sides.predicted.genes),
        ]
        advance(1, "figures")
    return parts


def _season(material: Material) -> Season:
    """Return the rules by which the prediction's cells are labelled."""
    if material.plan is not None:
        return season(material.plan["season"], material.plan["rules"])
    made = read_manifest(material.prediction, kind="prediction").config if material.prediction else {}
    return season(made.get("season", "vcc2025"), made.get("rules", {}))


def _read(material: Material, truth: Path | None, progress: Progress) -> _Sides:
    rules, limits = _season(material), Limits()
    store = Store.open(material.store) if material.store is not None else None
    if store is not None and material.run_facts.get("store_fingerprint") not in (None, "", store.fingerprint):
        raise CheckpointError(
            f"{store.path}: not the store that {material.run} was trained on; give the run its own store"
        )
    target_sum, context = store.target_sum if store else None, _only(material, "context")
    dataset = _only(material, "dataset")
    assert material.prediction is not None
    predicted = sample_h5ad(material.prediction, rules, title="predicted", target_sum=target_sum, progress=progress)
    measured: dict[str, Cells | None] = {}
    if store is not None:
        for name, split in (("training", Split.TRAIN), ("held out", Split.VAL | Split.TEST)):
            measured[name] = sample_store(
                store, predicted.groups, split=split, title=name, within=context, dataset=dataset, limits=limits
            )
    if truth is not None:
        measured["real"] = sample_h5ad(truth, rules, title="real", target_sum=target_sum, progress=progress)
    there = {name: cells for name, cells in measured.items() if cells is not None}
    shared = set(predicted.genes).intersection(*(cells.genes for cells in there.values()))
    genes = tuple(gene for gene in predicted.genes if gene in shared)
    if not genes:
        raise DataError(
            f"{material.prediction}: it shares no gene with {truth or material.store}; give cells of the same genes"
        )
    there = {name: cells.on_genes(genes) for name, cells in there.items()}
    predicted = predicted.on_genes(genes)
    if "training" in there:
        predicted = with_controls(predicted, there["training"])
    return _Sides(predicted, there, _plane_of(store, genes, context))


def _only(material: Material, key: str) -> str | None:
    """Return the context or dataset of the prediction if its plan has only one."""
    found = {part.get(key) for part in material.plan["parts"]} - {None} if material.plan else set()
    return str(next(iter(found))) if len(found) == 1 else None


def _plane_of(store: Store | None, genes: Sequence[str], context: str | None) -> Plane | None:
    """Return the plane of a store's training cells, whatever they were perturbed by; of one context if it is named."""
    if store is None:
        return None
    rows = store.rows(split=Split.TRAIN, context=store.contexts.index(context) if context in store.contexts else None)
    if len(rows) > _PLANE_POINTS * 2:
        rows = np.sort(generator(0, "report", "training").choice(rows, _PLANE_POINTS * 2, replace=False))
    codes = np.zeros(len(rows), dtype=np.int64)
    cells = Cells("training", store.genes, (Group("", ""),), ("",), store.csr(rows), codes, (len(rows),)).on_genes(
        genes
    )
    variable = {store.genes[place] for place in store.hvg}
    used = np.array([place for place, gene in enumerate(genes) if gene in variable], dtype=np.int64)
    return fit_plane(cells, used if len(used) >= 50 else None)


def _effect_section(predicted: Effects, measured: Mapping[str, Effects]) -> Section:
    found = {name: rows for name, other in measured.items() if (rows := agreement(predicted, other))}
    if not found:
        said = (
            "No measured cells of the predicted targets are here; `pertcast report --truth REAL.h5ad` sets them beside."
        )
        return section("effects", "Effect sizes", paragraph(said))
    drawn = effect_sizes(found)
    said = "Agreement with training cells says what was learnt; held-out and real cells say what is predicted."
    return section("effects", "Effect sizes", paragraph(said), figure(drawn), figures=[drawn])


def _plane_section(sides: _Sides) -> Section:
    if sides.plane is None:
        said = "The run's store is not here; the components are fitted on its training cells. Bring it beside the run."
        return section("cells", "Cells", paragraph(said))
    layers: dict[str, tuple[NDArray[np.float64], list[str]]] = {}
    best = sides.best
    source = best if best is not None else sides.predicted
    controls = np.flatnonzero(source.codes >= len(source.groups))
    for name, cells, rows in (
        ("controls", source, controls),
        *(((best.title, best, np.flatnonzero(best.codes < len(best.groups))),) if best is not None else ()),
        ("predicted", sides.predicted, np.flatnonzero(sides.predicted.codes < len(sides.predicted.groups))),
    ):
        if len(rows) > _PLANE_POINTS:
            rows = np.sort(generator(0, "report", "points", name).choice(rows, _PLANE_POINTS, replace=False))
        codes = cells.codes[rows]
        labels = ["control" if code >= len(cells.groups) else cells.groups[code].label for code in codes]
        if len(rows):
            layers[name] = sides.plane.project(cells.log1p[rows]), labels
    drawn = plane(sides.plane.shares, layers)
    return section("cells", "Cells", figure(drawn), figures=[drawn])


def _gene_section(
    predicted: Effects, measured: Effects | None, tables: Mapping[str, Mapping[Group, DeTable]]
) -> Section:
    genes = predicted.cells.genes
    groups = predicted.cells.groups[:_GROUPS_SHOWN]
    chosen = _top_genes(tables, groups)
    if not len(chosen):
        return section("genes", "Top DE genes", paragraph("No gene is DE in any target, predicted or measured."))
    names = [genes[place] for place in chosen]
    ours = predicted.effect[: len(groups), chosen]
    theirs = np.full(ours.shape, np.nan)
    if measured is not None:
        for place, group in enumerate(groups):
            if (other := measured.of(group)) is not None:
                theirs[place] = measured.effect[other, chosen]
    sizes = np.abs(np.concatenate([ours, theirs]))
    limit = float(np.nanquantile(sizes, 0.98)) or 1.0
    drawn = [heatmap("predicted", ours, genes=names, groups=groups, limit=limit)]
    if measured is not None:
        drawn.append(heatmap(measured.cells.title, theirs, genes=names, groups=groups, limit=limit))
    more = len(predicted.cells.groups) - len(groups)
    notes = [f"{more} more targets are not shown."] if more else []
    grid = '<div class="grid">' + "".join(map(figure, drawn)) + "</div>"
    return section("genes", "Top DE genes", unordered(notes), grid, figures=drawn)


def _top_genes(tables: Mapping[str, Mapping[Group, DeTable]], groups: Sequence[Group]) -> NDArray[np.int64]:
    """Return the most significant genes in turns: each target's best, then the next; measured before predicted."""
    ranked = []
    for side in reversed(list(tables.values())):
        for group in groups:
            if group in side:
                p_value, fdr = side[group].p_value[0], side[group].fdr[0]
                best = np.argsort(p_value, kind="stable")[:_GENES_SHOWN]
                ranked.append([int(place) for place in best if fdr[place] < FDR])
    chosen: dict[int, None] = {}
    for turn in range(_GENES_SHOWN):
        for order in ranked:
            if turn < len(order) and len(chosen) < _GENES_SHOWN:
                chosen[order[turn]] = None
    return np.array(sorted(chosen), dtype=np.int64)


def _volcano_section(tables: Mapping[str, Mapping[Group, DeTable]], genes: Sequence[str]) -> Section:
    there = {name: dict(list(side.items())[:_GROUPS_SHOWN]) for name, side in tables.items() if side}
    if not there:
        said = "There are no control cells to test against, neither in the prediction nor in a store beside the run."
        return section("volcano", "Volcano", paragraph(said))
    drawn = [
        volcano(name, side, genes=genes, num_points=max(100, min(1500, _VOLCANO_POINTS // len(side))))
        for name, side in there.items()
    ]
    grid = '<div class="grid">' + "".join(map(figure, drawn)) + "</div>"
    return section("volcano", "Volcano", grid, figures=drawn)
