"""The part of the page on how real the cells look: what ``pertcast check --against`` wrote beside the prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pertcast.ladder.report.figure import Table, number
from pertcast.ladder.report.gather import Material
from pertcast.ladder.report.html import Section, paragraph, plain, section, table, unordered

__all__ = ["realism"]

_SIDES = {"real": "real against real", "null": "predicted controls", "targets": "targets, median"}
_NAMES = {
    "num_cells": "cells compared",
    "de_calls": "genes called DE",
    "variance_ratio": "variance over the real one (quantiles .1, .5, .9 of genes)",
    "zero_difference": "share of zeros less the real one (quantiles .05, .5, .95, mean)",
    "correlation": "agreement of gene-gene correlations",
}


def realism(material: Material) -> Section:
    """Return the verdicts and the numbers of ``realism.json``; another form of it is shown as it stands."""
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
        pieces = [table(Table(("fact", "value"), tuple(_leaves(rest))), caption="Facts of realism.json")]
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


def _leaves(tree: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        name = f"{place}.{key}" if place else str(key)
        if isinstance(value, Mapping):
            yield from _leaves(value, name)
        else:
            yield name, _shown(value)
