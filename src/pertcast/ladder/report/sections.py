"""The parts of the page that need no cells: the run in numbers, training, budget, check, the ladder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pertcast import __version__
from pertcast.config import rung_of
from pertcast.files.artefacts import read_manifest
from pertcast.ladder.ledger import METRICS, Change, Ledger
from pertcast.ladder.report.figure import Table, number
from pertcast.ladder.report.figures import curves
from pertcast.ladder.report.gather import Material
from pertcast.ladder.report.html import Section, details, facts, figure, paragraph, plain, section, table, unordered

__all__ = ["budget", "check", "colophon", "ladder", "run_in_numbers", "training"]


def run_in_numbers(material: Material) -> Section:
    """Return what was trained on what, and what came out of it."""
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
    """Return the curve of each term of the loss."""
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
    """Return how many cells each target gets."""
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
    """Return all submissions and what moved between them."""
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
        plain(item.origin.step if item.origin else None),
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
    """Return what made the page."""
    return f"Made by pertcast {__version__}."
