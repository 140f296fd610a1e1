"""The figures of genes: a heatmap of effects, and a volcano plot with a choice of targets; pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pertcast.ladder.report.figure import GREY, VERMILLION, Figure, Table, axis, number, rounded
from pertcast.ladder.report.sample import Group
from pertcast.stats.de import FDR, DeTable
from pertcast.stats.draws import generator

__all__ = ["heatmap", "volcano"]

_DIVERGING = [[0.0, "#0072B2"], [0.25, "#7fb8d8"], [0.5, "#f4f4f4"], [0.75, "#eaae7f"], [1.0, "#D55E00"]]
_FOLD_LIMIT = 10.0


def heatmap(
    name: str, effects: NDArray[np.float64], *, genes: Sequence[str], groups: Sequence[Group], limit: float
) -> Figure:
    """Return effects (groups, genes) as a heatmap, genes downwards; a group without an effect stays empty."""
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
    """Return a volcano plot with a choice of targets.

    Parameters
    ----------
    name
        ``predicted`` or what was measured.
    tables
        Group → statistics of (1, genes); at least one group.
    genes
        Names.
    num_points
        Points of each target: the most significant genes, and others drawn with a seed.
    """
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
