"""The figures of the report, as pure functions of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pertcast.ladder.report.measure import Agreement, Group
from pertcast.stats.de import FDR, DeTable
from pertcast.stats.draws import generator

GREY, ORANGE, SKY, GREEN = "#8a8a8a", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
MEASURED = {"training": (BLUE, "circle"), "held out": (GREEN, "square"), "real": (PURPLE, "diamond")}


@dataclass(frozen=True)
class Table:
    """Numbers as text; the first column names the row."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Figure:
    """A figure, and the same content in words."""

    name: str  # Its id in the page
    title: str  # Shown above and below it
    caption: str
    alternative: str  # The text alternative
    data: list[dict[str, Any]]  # plotly's
    layout: dict[str, Any]
    table: Table | None = None  # Its numbers, if they are few enough
    # Name → the data that take the place of `data` when the name is chosen from a list; a whole number is
    # for the trace of `data` at that place
    choices: dict[str, list[dict[str, Any] | int]] = field(default_factory=dict)
    height: int = 340  # In pixels


def number(value: float, digits: int = 3) -> str:
    """Return a number as text, a dash if there is none.

    >>> number(0.12345), number(float("nan")), number(12345.0)
    ('0.123', '–', '1.23e+04')
    """
    return "–" if value != value else f"{value:.{digits}g}"


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Return an axis; `more` is plotly's."""
    return {"title": {"text": title}, "zeroline": False, "automargin": True, **more}


def rounded(values: Iterable[float], digits: int) -> list[float | None]:
    """Return numbers as JSON values, ``None`` if they are not finite."""
    return [round(float(value), digits) if np.isfinite(value) else None for value in values]


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
    """Plot predicted against measured effect sizes."""
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
    """Plot cells on two principal components."""
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
        f"{shares.sum():.1%} of the variance: overlapping clouds here may still differ.",
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


_DIVERGING = [[0.0, "#0072B2"], [0.25, "#7fb8d8"], [0.5, "#f4f4f4"], [0.75, "#eaae7f"], [1.0, "#D55E00"]]
_FOLD_LIMIT = 10.0


def heatmap(
    name: str, effects: NDArray[np.float64], *, genes: Sequence[str], groups: Sequence[Group], limit: float
) -> Figure:
    """Plot effects (groups, genes) as a heatmap; a group without an effect stays empty."""
    labels = [group.label for group in groups]
    return Figure(
        f"heatmap-{name.replace(' ', '-')}",
        f"{name.capitalize()} effects of the top DE genes",
        "Difference of mean log1p from controls; blue lower, orange higher. The genes are those that are DE with the "
        "smallest p-values, some of each target; both maps have the same genes and colours.",
        f"Heatmap of {name} mean effects of {len(genes)} genes in {len(labels)} targets. The numbers are in the table.",
        [
            {
                "type": "heatmap",
                "x": labels,
                "y": list(genes),
                "z": [rounded(row, 3) for row in effects.T],
                "zmin": -limit,
                "zmax": limit,
                "colorscale": _DIVERGING,
                "colorbar": {"thickness": 10, "title": {"text": "log1p", "side": "right"}},
                "xgap": 1,
                "ygap": 1,
                "hovertemplate": "%{y} in %{x}: %{z:.2f}<extra></extra>",
            }
        ],
        {"xaxis": axis("", tickangle=-60), "yaxis": axis("", autorange="reversed", dtick=1, tickfont={"size": 10})},
        Table(
            ("gene", *labels),
            tuple((gene, *(number(value, 2) for value in effects[:, at])) for at, gene in enumerate(genes)),
        ),
        height=120 + 15 * len(genes),
    )


def volcano(name: str, tables: Mapping[Group, DeTable], *, genes: Sequence[str], num_points: int) -> Figure:
    """Plot a volcano plot with a choice of targets."""
    drawn = {group.label: _volcano_points(group, table, genes, num_points) for group, table in tables.items()}
    rows = tuple(_volcano_row(group, table, genes) for group, table in tables.items())
    first = next(iter(drawn))
    choices: dict[str, list[dict[str, Any] | int]] = {label: [*traces] for label, traces in drawn.items()}
    return Figure(
        f"volcano-{name.replace(' ', '-')}",
        f"{name.capitalize()} cells against their controls",
        f"Wilcoxon's rank-sum test as the official scorer has it; DE at an FDR of {FDR}. Fold changes "
        f"beyond ±{_FOLD_LIMIT:g} stand at ±{_FOLD_LIMIT:g}; of genes that are not DE some are drawn with a seed.",
        f"Volcano plot of {name} cells of one target: log2 fold change across, minus log10 of the p-value upwards. "
        "How many genes are DE in each target is in the table.",
        drawn[first],
        {"xaxis": axis("log2 fold change"), "yaxis": axis("−log10 p", rangemode="tozero")},
        Table(("target", "DE genes", "up", "down", "most significant"), rows),
        choices=choices | {first: list(range(len(drawn[first])))},
        height=380,
    )


def _volcano_points(group: Group, table: DeTable, genes: Sequence[str], most: int) -> list[dict[str, Any]]:
    p_value, fdr, fold = (values[0] for values in table)
    order = np.argsort(p_value, kind="stable")
    top, rest = order[: most // 2], order[most // 2 :]
    some = generator(0, "report", "volcano", *group).choice(rest, min(len(rest), most - len(top)), replace=False)
    shown = np.concatenate([top, np.sort(some)])
    is_de = fdr[shown] < FDR
    data = []
    for title, kept, colour, symbol in (("not DE", ~is_de, GREY, "circle-open"), ("DE", is_de, VERMILLION, "diamond")):
        at = shown[kept]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": title,
                "x": rounded(np.clip(np.nan_to_num(fold[at], nan=0.0), -_FOLD_LIMIT, _FOLD_LIMIT), 2),
                "y": rounded(-np.log10(np.maximum(p_value[at], 1e-300)), 2),
                "text": [genes[number] for number in at],
                "hovertemplate": "%{text}: %{x}, %{y}<extra></extra>",
                "marker": {"color": colour, "symbol": symbol, "size": 5 if title == "not DE" else 7, "opacity": 0.8},
            }
        )
    return data


def _volcano_row(group: Group, table: DeTable, genes: Sequence[str]) -> tuple[str, ...]:
    p_value, fdr, fold = (values[0] for values in table)
    called = fdr < FDR
    best = np.argsort(p_value, kind="stable")[:5]
    names = ", ".join(genes[at] for at in best if called[at]) or "–"
    up, down = int((called & (fold > 0)).sum()), int((called & (fold < 0)).sum())
    return (group.label, f"{int(called.sum()):,}", f"{up:,}", f"{down:,}", names)
