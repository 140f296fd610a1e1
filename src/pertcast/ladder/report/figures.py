"""The figures of training and of cells: pure functions from numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pertcast.ladder.report.figure import GREY, MEASURED, ORANGE, SKY, VERMILLION, Figure, Table, axis, number, rounded
from pertcast.ladder.report.measure import Agreement

__all__ = ["curves", "effect_sizes", "plane"]

_MAX_POINTS = 600
_TERMS = {
    "loss": "Loss",
    "energy": "Energy distance",
    "mae": "Error of the pseudobulk (mae)",
    "de": "DE head",
    "rank": "Ranking",
    "decoder": "Decoder",
}


def curves(metrics: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Return a figure for each term of the loss, the whole loss first."""
    passed = {"kind", "step", "learning_rate", "grad_norm"}
    names = dict.fromkeys(name for line in metrics for name in line if name not in passed)
    return [figure for name in names if (figure := _curve(metrics, name)) is not None]


def _curve(metrics: Sequence[Mapping[str, Any]], name: str) -> Figure | None:
    data, rows = [], []
    titles = (("train", "training sets", SKY, "lines"), ("val", "validation sets", VERMILLION, "lines+markers"))
    values: list[float] = []
    for kind, title, colour, mode in titles:
        lines = [line for line in metrics if line.get("kind") == kind and isinstance(line.get(name), int | float)]
        if not lines:
            continue
        steps, level = _binned([line["step"] for line in lines], [line[name] for line in lines])
        values += level
        data.append(
            {
                "type": "scatter",
                "mode": mode,
                "name": title,
                "x": steps,
                "y": rounded(level, 6),
                "line": {"color": colour, "width": 1.5 if kind == "train" else 2},
                "marker": {"symbol": "diamond", "size": 7, "color": colour},
            }
        )
        last, least = lines[-1][name], min(lines, key=lambda line: float(line[name]))
        rows.append((title, number(lines[0][name]), number(last), f"{number(least[name])} at step {least['step']:,}"))
    if not data:
        return None
    positive = min(values) > 0 and max(values) / min(values) > 20
    scale = {"type": "log", "dtick": "D2"} if positive else {"type": "linear"}
    shown = "the loss" if name == "loss" else f"the term {name}"
    said = "; ".join(f"{row[0]}: first {row[1]}, last {row[2]}, least {row[3]}" for row in rows)
    return Figure(
        f"curve-{name}",
        _TERMS.get(name, name),
        "Mean of neighbouring steps where there are many."
        if max(len(line["x"]) for line in data) == _MAX_POINTS
        else "",
        f"Line chart of {shown} over training steps. {said}.",
        data,
        {"xaxis": axis("step"), "yaxis": axis("", **scale), "showlegend": True},
        Table((name, "first", "last", "least"), tuple(rows)),
        height=280,
    )


def _binned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Return at most so many points, each the mean of neighbours."""
    if len(steps) <= _MAX_POINTS:
        return list(steps), [float(value) for value in values]
    groups = np.array_split(np.arange(len(steps)), _MAX_POINTS)
    level = np.asarray(values, dtype=np.float64)
    return [int(steps[group[-1]]) for group in groups], [float(level[group].mean()) for group in groups]


def effect_sizes(found: Mapping[str, Sequence[Agreement]]) -> Figure:
    """Return predicted against measured effect sizes; a name of :class:`Cells` → its rows."""
    data: list[dict[str, Any]] = []
    for name, rows in found.items():
        colour, symbol = MEASURED[name]
        hover = [f"{row.group.label}<br>correlation {number(row.correlation, 2)}" for row in rows]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"against {name.replace(' ', '-')} cells",
                "x": rounded((row.measured_size for row in rows), 4),
                "y": rounded((row.predicted_size for row in rows), 4),
                "text": hover,
                "hovertemplate": "%{text}<br>measured %{x:.3g}, predicted %{y:.3g}<extra></extra>",
                "marker": {"color": colour, "symbol": symbol, "size": 9, "line": {"width": 1, "color": "#ffffff"}},
            }
        )
    num_targets = len({row.group for rows in found.values() for row in rows})
    sizes = [size for rows in found.values() for row in rows for size in (row.measured_size, row.predicted_size)]
    most = max((size for size in sizes if np.isfinite(size)), default=1.0) * 1.05
    line = {"color": GREY, "dash": "dash", "width": 1}
    data.append({"type": "scatter", "mode": "lines", "name": "equal", "x": [0, most], "y": [0, most], "line": line})
    header = ("target", "measured on", "cells", "measured size", "from sampling alone", "predicted size", "correlation",
              "own gene left, measured", "own gene left, predicted")  # fmt: skip
    return Figure(
        "effect-sizes",
        "Effect size of each target",
        "The size is the L2 norm over genes of the mean effect (log1p). Sampling alone gives a measured effect the "
        "size in the table, though there were no effect at all: a measured size near it says little.",
        f"Scatter plot of predicted against measured effect size for {num_targets} targets, with the line of equality. "
        "The numbers are in the table.",
        data,
        {"xaxis": axis("measured size", rangemode="tozero"), "yaxis": axis("predicted size", rangemode="tozero")},
        Table(header, tuple(_agreement_row(name, row) for name, rows in found.items() for row in rows)),
        height=400,
    )


def _agreement_row(name: str, row: Agreement) -> tuple[str, ...]:
    left = ["–" if value != value else f"{value:.0%}" for value in (row.measured_left, row.predicted_left)]
    sizes = [number(row.measured_size), number(row.measured_noise), number(row.predicted_size)]
    return (row.group.label, name, f"{row.measured_cells:,}", *sizes, number(row.correlation, 2), *left)


def plane(shares: NDArray[np.float64], points: Mapping[str, tuple[NDArray[np.float64], Sequence[str]]]) -> Figure:
    """Return cells on two principal components.

    Parameters
    ----------
    shares
        (2,) shares of the variance.
    points
        Name of a layer → (n, 2) coordinates and the label of each cell; ``controls`` are always shown.
    """
    looks = {"controls": (GREY, "circle-open", 0.7), "predicted": (ORANGE, "triangle-up", 0.75)}
    looks |= {name: (colour, symbol, 0.75) for name, (colour, symbol) in MEASURED.items()}

    def layers(target: str | None) -> list[dict[str, Any]]:
        drawn: list[dict[str, Any]] = []
        for name, (coordinates, labels) in points.items():
            colour, symbol, opacity = looks[name]
            kept = np.array([target is None or name == "controls" or label == target for label in labels], dtype=bool)
            drawn.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": name,
                    "x": rounded(coordinates[kept, 0], 2),
                    "y": rounded(coordinates[kept, 1], 2),
                    "text": [label for label, keep in zip(labels, kept, strict=True) if keep],
                    "hovertemplate": f"%{{text}} ({name})<extra></extra>",
                    "marker": {"color": colour, "symbol": symbol, "size": 6, "opacity": opacity},
                }
            )
        return drawn

    def chosen(target: str) -> list[dict[str, Any] | int]:
        drawn = layers(target)
        return [place if name == "controls" else drawn[place] for place, name in enumerate(points)]

    choices: dict[str, list[dict[str, Any] | int]] = {"all targets": list(range(len(points)))}
    perturbed = [labels for name, (_, labels) in points.items() if name != "controls"]
    targets = list(dict.fromkeys(label for labels in perturbed for label in labels))
    choices |= {target: chosen(target) for target in targets}
    counts = ", ".join(f"{len(labels):,} {name}" for name, (_, labels) in points.items())
    return Figure(
        "components",
        "Cells on two principal components",
        f"Fitted on training cells alone; {counts} cells, drawn with a seed. Two components hold "
        f"{shares.sum():.1%} of the variance: clouds that lie on each other here may still differ.",
        f"Scatter plot of {counts} cells on the first two principal components of the training cells.",
        layers(None),
        {"xaxis": axis(f"PC 1 ({shares[0]:.1%})"), "yaxis": axis(f"PC 2 ({shares[1]:.1%})")},
        Table(
            ("cells", "mean PC 1", "mean PC 2", "sd PC 1", "sd PC 2"),
            tuple(
                (name, *(number(value) for value in (*coordinates.mean(axis=0), *coordinates.std(axis=0))))
                for name, (coordinates, _) in points.items()
            ),
        ),
        choices=choices,
        height=440,
    )
