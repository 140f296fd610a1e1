"""The sections of the report: the run in numbers, training, budget, check, cells, realism, the ladder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pertcast import __version__
from pertcast.config import rung_of
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import CheckpointError, DataError
from pertcast.files.artefacts import read_manifest
from pertcast.ladder.ledger import METRICS, Change, Ledger
from pertcast.ladder.report.figures import Table, curves, effect_sizes, heatmap, number, plane, volcano
from pertcast.ladder.report.gather import Material
from pertcast.ladder.report.html import Section, details, facts, figure, paragraph, plain, section, table, unordered
from pertcast.ladder.report.measure import (
    Cells,
    Effects,
    Group,
    Limits,
    Plane,
    agreement,
    de_tables,
    effects,
    fit_plane,
    sample_h5ad,
    sample_store,
    with_controls,
)
from pertcast.progress import Progress
from pertcast.seasons import Season, season
from pertcast.stats.de import FDR, DeTable
from pertcast.stats.draws import generator


def run_in_numbers(material: Material) -> Section:
    """Return the summary of the run."""
    if material.run_manifest is None:
        return section("run", "The run in numbers", paragraph("No run is here; `pertcast train` makes one."))
    manifest, experiment = material.run_manifest, material.experiment
    metrics = manifest.facts.get("metrics", {})
    model, loss = experiment.get("model", {}), experiment.get("loss", {})
    kind = str(model.get("kind", "state"))
    weights = {name: loss.get(name, 0) for name in ("energy", "mae", "de", "rank")}
    pairs = [
        ("rung", rung_of(loss) if kind == "state" else "other"),
        ("model", " ".join(str(item) for item in (kind, model.get("preset")) if item)),
        ("weights of the loss", ", ".join(f"{name} {value:g}" for name, value in weights.items())),
        ("parameters", plain(metrics.get("num_parameters"))),
        ("step of the weights", plain(manifest.facts.get("step"))),
        ("steps trained", plain(metrics.get("last_step"))),
        ("validation loss", plain(metrics.get("val_loss"))),
        ("seed", plain(experiment.get("train", {}).get("seed"))),
        ("features", plain(material.run_facts.get("features", {}).get("source"))),
        *_store_pairs(material),
        ("sha256 of the weights", manifest.files.get("weights.safetensors", "–")),
        ("made with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
    ]
    config = Table(("key", "value"), tuple(_leaves(experiment)))
    return section(
        "run",
        "The run in numbers",
        facts(pairs),
        unordered(manifest.notes),
        details("The whole experiment", table(config, caption="The resolved experiment")),
    )


def _store_pairs(material: Material) -> list[tuple[str, str]]:
    if material.store is None:
        return []
    known = read_manifest(material.store, kind="store").facts
    names = ", ".join(known["contexts"][:5]) + (" ..." if len(known["contexts"]) > 5 else "")
    return [
        ("cells of the store", plain(known["num_cells"])),
        ("genes", plain(len(known["genes"]))),
        ("perturbations of the store", plain(len(known["perts"]) - 1)),
        ("contexts", names),
    ]


def _leaves(tree: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        name = f"{place}.{key}" if place else str(key)
        if isinstance(value, Mapping):
            yield from _leaves(value, name)
        else:
            yield name, plain(value)


def training(material: Material) -> Section:
    """Return the curve of each loss term."""
    drawn = curves(material.metrics)
    if not drawn:
        said = paragraph("There is no metrics.jsonl with losses in the run's folder; `pertcast train` writes it.")
        return section("training", "Training", said)
    return section(
        "training",
        "Training",
        paragraph("Each term as it was measured, before its weight; the loss is their weighted sum."),
        '<div class="grid">' + "".join(map(figure, drawn)) + "</div>",
        figures=drawn,
    )


def budget(material: Material) -> Section:
    """Return the cells of each target."""
    if material.plan is None:
        return section(
            "budget", "The budget", paragraph("There is no plan; `pertcast generate` writes one beside its parts.")
        )
    plan = material.plan
    parts, control = plan["parts"], plan["control_label"]
    cells = [part["num_cells"] for part in parts if part["target"] != control]
    pairs = [
        ("targets", plain(len({part["target"] for part in parts if part["target"] != control}))),
        ("cells of targets", plain(sum(cells))),
        ("control cells", plain(plan["num_controls"])),
        ("in all", plain(sum(cells) + plan["num_controls"])),
        ("share of what was asked for (α)", plain(plan["alpha"])),
        ("fewest and most of a target", f"{min(cells):,} to {max(cells):,}" if cells else "–"),
    ]
    rows = tuple((part["target"], str(part["context"] or "–"), f"{part['num_cells']:,}") for part in parts)
    listed = table(Table(("target", "context", "cells"), rows), caption="Cells of each target")
    return section(
        "budget", "The budget", facts(pairs), unordered(plan["notes"]), details("Cells of each target", listed)
    )


def check(material: Material) -> Section:
    """Return the verdict of the check."""
    found = material.check
    if found is None:
        said = (
            "No check.json is beside the prediction; `pertcast run` writes it, `pertcast check ... --json` prints it."
        )
        return section("check", "The check", paragraph(said))
    verdict = "valid" if found["ok"] else f"not valid: {len(found['problems'])} problem(s)"
    marks = {True: "✓ yes", False: "✗ no", None: "– not asked"}
    rows = tuple((item["question"], marks[item["ok"]], item["evidence"]) for item in found["checklist"])
    problems = [f"{item['place']}: {item['message']}; {item['remedy']}" for item in found["problems"]]
    return section(
        "check",
        "The check",
        paragraph(f"Season {found['season']}: {verdict}.", kind="good" if found["ok"] else "bad"),
        unordered(problems),
        table(Table(("question", "holds", "evidence"), rows), caption="The pre-flight questions"),
        unordered(found["notes"]),
    )


def ladder(material: Material, ledger: Ledger) -> Section:
    """Return all submissions and how their scores moved."""
    if not ledger.submissions:
        said = (
            "No packed submission was found here; `pertcast pack` makes one, `pertcast ladder record` notes its scores."
        )
        return section("ladder", "The ladder", paragraph(said))
    names = [
        name for name in METRICS if any(item.scores and name in item.scores.metrics for item in ledger.submissions)
    ]
    rows = tuple(_ladder_row(ledger, at, names, material) for at in range(1, len(ledger.submissions) + 1))
    header = (
        "submission",
        "rung",
        "model",
        "step",
        "packed (UTC)",
        "changed against the one before",
        *(METRICS[n].title for n in names),
        "sha256",
    )
    trade_offs = ledger.trade_offs()
    moved = [
        (
            ", ".join(f"{key} {plain(a)} → {plain(b)}" for key, (a, b) in (item.changed or {}).items()) or "–",
            f"{item.before} → {item.now}",
            *(_relative(item.moved.get(name)) for name in names),
        )
        for item in trade_offs
    ]
    units = [f"{METRICS[n].title}: {METRICS[n].unit}; {METRICS[n].better or 'direction not known'}" for n in names]
    pieces = [table(Table(header, rows), caption="Submissions, oldest first; * is this one")]
    if moved:
        content = Table(("changed", "submissions", *(METRICS[n].title for n in names)), tuple(moved))
        pieces.append(table(content, caption="Trade-offs seen so far: relative improvement, + is better"))
    if names:
        pieces.append(details("Units, and which way is better", unordered(units)))
    else:
        pieces.append(
            paragraph("No scores are recorded yet: `pertcast ladder record FILE.vcc --overall ... --mae ...`.")
        )
    return section("ladder", "The ladder", *pieces)


def _ladder_row(ledger: Ledger, at: int, names: Sequence[str], material: Material) -> tuple[str, ...]:
    item = ledger.submissions[at - 1]
    changed = ledger.changed(at)
    shown = "–" if changed is None else ", ".join(f"{k} {plain(a)} → {plain(b)}" for k, (a, b) in changed.items())
    is_this = (
        material.archive is not None and item.archive.resolve() == material.archive.resolve() and item.state == "packed"
    )
    scores = item.scores.metrics if item.scores else {}
    return (
        f"{at}{'*' if is_this else ''}\u00a0{item.archive.parent.name}/{item.archive.name}",
        item.rung or "unknown",
        item.kind or "unknown",
        plain(item.provenance.step if item.provenance else None),
        item.packed_at[:16].replace("T", "\u00a0").replace("-", "\u2011"),
        shown or "nothing",
        *(number(scores[name], 4) if name in scores else "–" for name in names),
        item.sha256[:12],
    )


def _relative(change: Change | None) -> str:
    if change is None or change.improvement is None:
        return "–"
    return f"{change.relative:+.1%}" if change.relative is not None else f"{change.improvement:+.3g} from 0"


def colophon() -> str:
    """Return the versions that made the page."""
    return f"Made by pertcast {__version__}."


_TITLES = (("effects", "Effect sizes"), ("cells", "Cells"), ("genes", "Top DE genes"), ("volcano", "Volcano"))
_GENES_SHOWN = 40
_GROUPS_SHOWN = 60
_VOLCANO_POINTS = 40_000
_PLANE_POINTS = 900


@dataclass(frozen=True, eq=False)
class _Sides:
    """Predicted cells, the measured ones beside them, and the plane of the training cells."""

    predicted: Cells
    measured: dict[str, Cells]
    plane: Plane | None

    @property
    def best(self) -> Cells | None:
        """The measured cells to compare with: real ones if they are given."""
        return self.measured.get("real") or self.measured.get("training") or self.measured.get("held out")


def cell_sections(material: Material, *, truth: Path | None, progress: Progress) -> list[Section]:
    """Return the sections about cells; if cells are missing, each says how to make them."""
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
    """Return the rules for the prediction's labels."""
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
    """Return the context or dataset of the prediction if there is only one."""
    found = {part.get(key) for part in material.plan["parts"]} - {None} if material.plan else set()
    return str(next(iter(found))) if len(found) == 1 else None


def _plane_of(store: Store | None, genes: Sequence[str], context: str | None) -> Plane | None:
    """Return the plane of a store's training cells, of one context if it is named."""
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
    """Return the most significant genes in turns: each target's best, then the next; measured first."""
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


_SIDES = {"real": "real against real", "null": "predicted controls", "targets": "targets, median"}
_NAMES = {
    "num_cells": "cells compared",
    "de_calls": "genes called DE",
    "variance_ratio": "variance over the real one (quantiles .1, .5, .9 of genes)",
    "zero_difference": "share of zeros less the real one (quantiles .05, .5, .95, mean)",
    "correlation": "agreement of gene-gene correlations",
}


def realism(material: Material) -> Section:
    """Return the verdicts and numbers of ``realism.json``; an unknown form is shown as it is."""
    found = material.realism
    if not isinstance(found, Mapping):
        said = "How real the cells look is not known yet; `pertcast check ... --against REAL.h5ad` writes realism.json."
        return section("realism", "Realism of the cells", paragraph(said))
    contexts = found.get("contexts")
    notes = [str(note) for note in found.get("notes", ())] if isinstance(found.get("notes"), Sequence) else []
    if isinstance(contexts, Sequence) and contexts and all(_is_context(item) for item in contexts):
        pieces = [piece for item in contexts for piece in _context(item)]
    else:
        rest = {name: value for name, value in found.items() if name != "notes"}
        pieces = [table(Table(("fact", "value"), tuple(_fact_rows(rest))), caption="Facts of realism.json")]
    return section("realism", "Realism of the cells", *pieces, unordered(notes))


def _is_context(item: object) -> bool:
    return isinstance(item, Mapping) and all(isinstance(item.get(side), Mapping | None) for side in _SIDES)


def _context(item: Mapping[str, Any]) -> Iterator[str]:
    of = f" in {item['context']}" if item.get("context") else ""
    verdicts = [
        (str(what), "✓ yes" if holds else "✗ no", str(numbers)) for what, holds, numbers in item.get("verdicts", ())
    ]
    if verdicts:
        yield table(Table(("question", "holds", "evidence"), tuple(verdicts)), caption=f"Cells without an effect{of}")
    sides = {title: item[side] for side, title in _SIDES.items() if item.get(side)}
    there = {name for side in sides.values() for name in side}
    names = [*(name for name in _NAMES if name in there), *sorted(there - _NAMES.keys())]
    rows = [(_NAMES.get(name, name), *(_shown(side.get(name)) for side in sides.values())) for name in names]
    yield table(Table(("beside real control cells", *sides), tuple(rows)), caption=f"How the cells look{of}")


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return number(value) if isinstance(value, float) else plain(value)


def _fact_rows(tree: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        name = f"{place}.{key}" if place else str(key)
        if isinstance(value, Mapping):
            yield from _fact_rows(value, name)
        else:
            yield name, _shown(value)
