"""Tables of scored methods: means over targets and seeds, bootstrap intervals over targets, differences, strata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pertcast.stats.draws import generator
from pertcast.stats.metrics import overall

METRICS = ("mae", "des", "pds", "effect_correlation")
BASELINE = "mean effect, add"
_DRAWS = 2000
_WIDE = (2.5, 97.5)
Values = dict[str, NDArray[np.float64]]
Draws = NDArray[np.int64]


def write_table(folder: Path, *, title: str) -> str:
    """Return Markdown: every method, its differences from two baselines, and strata of effect strength."""
    methods, targets, sizes = _read(folder)
    genes = [name.partition("/")[2] for name in targets]
    # the contexts of a target are drawn together
    groups = [np.flatnonzero([gene == own for own in genes]) for gene in sorted(set(genes))]
    random = generator(0, "bootstrap", title)
    # every target stands in as many contexts as the others, so all draws have one length
    draws = np.stack(
        [
            np.concatenate([groups[place] for place in random.integers(len(groups), size=len(groups))])
            for _ in range(_DRAWS)
        ]
    )
    lines = [
        f"### {title}: {len(targets)} held-out effects",
        "",
        "| method | MAE | DES | PDS | effect correlation | overall |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in methods.items():
        lines.append(f"| {name} | " + " | ".join(_with_interval(values, methods[BASELINE], draws)) + " |")
    for other in ("mean effect", "ridge on labels"):
        lines += [
            "",
            f"Paired differences from {other}:",
            "",
            "| method | MAE | DES | PDS | effect correlation | overall |",
            "|---|---|---|---|---|---|",
        ]
        for name, values in methods.items():
            if name != other and other in methods:
                cells = _differences(values, methods[other], methods[BASELINE], draws)
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *_strata(methods, sizes)]
    return "\n".join(lines) + "\n"


def _read(folder: Path) -> tuple[dict[str, Values], list[str], NDArray[np.float64]]:
    """Return method -> metric -> value of each target, the mean over seeds; names of targets; sizes of real effects."""
    seen: dict[str, list[dict[str, dict[str, float]]]] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        seen.setdefault(content["method"], []).append(content["targets"])
    targets = sorted(seen[BASELINE][0])
    methods = {}
    for name, seeds in seen.items():
        methods[f"{name}" + ("" if len(seeds) == 3 else f" [{len(seeds)} seeds]")] = {
            # an effect that is 0 everywhere has no correlation: it counts as 0
            metric: np.nan_to_num([[one[target][metric] for target in targets] for one in seeds]).mean(axis=0)
            for metric in METRICS
        }
    sizes = np.array([seen[BASELINE][0][target]["effect_size"] for target in targets])
    order = sorted(methods, key=lambda name: (name.startswith("ceiling"), name.startswith("state"), name))
    return {name: methods[name] for name in order}, targets, sizes


def _overall(values: Values, base: Values, draws: Draws) -> NDArray[np.float64]:
    """Return the overall of each draw of targets."""
    kept = {name: (values[name][draws].mean(axis=1), base[name][draws].mean(axis=1)) for name in ("mae", "des", "pds")}
    rows = range(len(draws))
    return np.array(
        [
            overall(
                {name: own[row] for name, (own, _) in kept.items()}, {name: o[row] for name, (_, o) in kept.items()}
            )
            for row in rows
        ]
    )


def _with_interval(values: Values, base: Values, draws: Draws) -> list[str]:
    whole = np.arange(len(values["mae"]))[None]
    cells = []
    for metric in METRICS:
        digits = 4 if metric == "mae" else 3
        cells.append(_cell(float(values[metric].mean()), values[metric][draws].mean(axis=1), digits=digits))
    return [*cells, _cell(float(_overall(values, base, whole)[0]), _overall(values, base, draws), digits=3)]


def _differences(values: Values, other: Values, base: Values, draws: Draws) -> list[str]:
    whole = np.arange(len(values["mae"]))[None]
    cells = []
    for metric in METRICS:
        difference = values[metric] - other[metric]
        digits = 5 if metric == "mae" else 3
        cells.append(_cell(float(difference.mean()), difference[draws].mean(axis=1), digits=digits))
    drawn = _overall(values, base, draws) - _overall(other, base, draws)
    there = float((_overall(values, base, whole) - _overall(other, base, whole))[0])
    return [*cells, _cell(there, drawn, digits=3)]


def _cell(value: float, drawn: NDArray[np.float64], *, digits: int) -> str:
    low, high = np.percentile(drawn, _WIDE)
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _strata(methods: Mapping[str, Values], sizes: NDArray[np.float64]) -> list[str]:
    """Return the table of thirds by the size of the real effect, weak, middling and strong."""
    thirds = np.array_split(np.argsort(sizes, kind="stable"), 3)
    lines = [
        f"By size of the real effect (L2; thirds, {', '.join(f'{sizes[rows].mean():.2f}' for rows in thirds)}):",
        "",
        "| method | MAE weak / middling / strong | DES | PDS | effect correlation |",
        "|---|---|---|---|---|",
    ]
    for name, values in methods.items():
        cells = [
            " / ".join(f"{values[metric][rows].mean():.{4 if metric == 'mae' else 2}f}" for rows in thirds)
            for metric in METRICS
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines
