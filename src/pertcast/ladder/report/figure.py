"""What a figure is: plain plotly data, and the words and numbers that say the same; and what all figures share.

Colours are Okabe and Ito's, and marks differ in shape too. Grounds and fonts are left to the page, which knows whether
it is light, dark or printed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "MEASURED",
    "ORANGE",
    "PURPLE",
    "SKY",
    "VERMILLION",
    "Figure",
    "Table",
    "axis",
    "number",
    "rounded",
]

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
    """A figure and what says the same in words.

    Attributes
    ----------
    name
        Its id in the page.
    title, caption
        What stands over and under it.
    alternative
        What is said of it where it is not seen.
    data, layout
        plotly's.
    table
        Its numbers, if they are few enough.
    choices
        Name → the data that take the place of `data` when the name is chosen from a list; a whole number stands for
        the trace of `data` at that place.
    height
        In pixels.
    """

    name: str
    title: str
    caption: str
    alternative: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    table: Table | None = None
    choices: dict[str, list[dict[str, Any] | int]] = field(default_factory=dict)
    height: int = 340


def number(value: float, digits: int = 3) -> str:
    """Return a number as text, a dash where it is none.

    Examples
    --------
    >>> number(0.12345), number(float("nan")), number(12345.0)
    ('0.123', '–', '1.23e+04')
    """
    return "–" if value != value else f"{value:.{digits}g}"


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Return an axis; `more` is plotly's."""
    return {"title": {"text": title}, "zeroline": False, "automargin": True, **more}


def rounded(values: Iterable[float], digits: int) -> list[float | None]:
    """Return numbers as JSON has them, none where they are not finite."""
    return [round(float(value), digits) if np.isfinite(value) else None for value in values]
