"""A comparison as a chart: an SVG that stands alone, one panel a metric, one row a candidate, with its interval."""

from __future__ import annotations

from html import escape

from pertcast.ladder.comparison import METRICS, REFERENCES, Comparison
from pertcast.ladder.verdict import TITLES
from pertcast.stats.intervals import Interval

__all__ = ["draw_chart"]

_PANEL, _NAMES, _ROW, _TOP, _BOTTOM, _GAP = 190, 110, 24, 44, 34, 22
_BLUE, _GREY = "#0072b2", "#6b6b6b"


def draw_chart(comparison: Comparison) -> str:
    """Return the chart as SVG text; references are grey, and shapes tell them apart without colour."""
    names = (*comparison.candidates, *REFERENCES)
    width = _NAMES + len(METRICS) * (_PANEL + _GAP)
    height = _TOP + _ROW * len(names) + _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#1a1a1a">',
        "<title>Comparison on held-out perturbations: means and 95 % intervals</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for row, name in enumerate(names):
        parts.append(f'<text x="{_NAMES - 8}" y="{_middle(row) + 4}" text-anchor="end">{escape(name)}</text>')
    for column, metric in enumerate(METRICS):
        found = [comparison.levels[name][metric] for name in names]
        parts += _panel(found, _NAMES + column * (_PANEL + _GAP), height, title=_title(metric), names=names)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _title(metric: str) -> str:
    return TITLES[metric] + (" (lower is better)" if metric == "mae" else "")


def _middle(row: int) -> int:
    return _TOP + _ROW * row + _ROW // 2


def _panel(found: list[Interval], left: int, height: int, *, title: str, names: tuple[str, ...]) -> list[str]:
    known = [end for level in found for end in level if end == end]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    spread = (high - low) or 1.0
    bottom = height - _BOTTOM + 6

    def x(value: float) -> float:
        return round(left + 6 + (value - low) / spread * (_PANEL - 12), 1)

    parts = [
        f'<text x="{left}" y="24" font-weight="600">{escape(title)}</text>',
        f'<line x1="{left}" x2="{left + _PANEL}" y1="{bottom}" y2="{bottom}" stroke="{_GREY}"/>',
        f'<text x="{left}" y="{bottom + 16}">{low:.3g}</text>',
        f'<text x="{left + _PANEL}" y="{bottom + 16}" text-anchor="end">{high:.3g}</text>',
    ]
    for row, (name, level) in enumerate(zip(names, found, strict=True)):
        if level.value != level.value:
            continue
        y, colour = _middle(row), _GREY if name in REFERENCES else _BLUE
        label = escape(f"{name}: {level.value:.4g} [{level.low:.4g}, {level.high:.4g}]")
        mark = (
            f'<rect x="{x(level.value) - 4}" y="{y - 4}" width="8" height="8" fill="{colour}"/>'
            if name in REFERENCES
            else f'<circle cx="{x(level.value)}" cy="{y}" r="4.5" fill="{colour}"/>'
        )
        line = f'<line x1="{x(level.low)}" x2="{x(level.high)}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
        parts.append(f"<g><title>{label}</title>{line}{mark}</g>")
    return parts
