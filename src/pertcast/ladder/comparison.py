"""The result of a comparison: metrics of each candidate and their differences, with paired bootstrap intervals.

Legend of shapes: S seeds, U units (a held-out target in a context), R resamples. The overall is cell-eval's: of means
over all units, relative to the training-mean baseline, each metric clipped at 0. It is recomputed in each resample,
baseline included. The rank of a target (PDS) is not recomputed among the targets of a resample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pertcast.stats.intervals import Interval, Resamples, draw_resamples, interval, resampled_means
from pertcast.stats.metrics import BEST

Floats = NDArray[np.float64]
Scores = Mapping[str, Mapping[str, Mapping[str, float]]]

METRICS = ("mae", "des", "pds", "effect_correlation", "overall")
REFERENCES = ("baseline", "ceiling")
_SCORED = ("mae", "des", "pds", "effect_correlation", "num_de_predicted")
_MODELS = frozenset({"control", "mean", "ridge", "kernel_ridge", "knn"})
_STRATA = ("weak", "middle", "strong")
_UNITS_IN_STRATUM = 3


class Change(NamedTuple):
    """The difference between two candidates in a metric, absolute and in percent."""

    name: str
    against: str
    metric: str
    difference: Interval
    percent: Interval


@dataclass(frozen=True)
class Comparison:
    """The result."""

    candidates: tuple[str, ...]  # Names, in order
    units: tuple[tuple[str, str, int], ...]  # ``(context, target, fold)`` of each held-out unit
    num_seeds: int  # S
    # Candidate or reference → metric → (S, U); references have one row
    values: Mapping[str, Mapping[str, Floats]] = field(repr=False)
    # Candidate or reference → metric → mean with its interval; ``overall`` too
    levels: Mapping[str, Mapping[str, Interval]]
    changes: tuple[Change, ...]  # Each candidate against the one before it and against every model and reference
    # Stratum of the size of the real effect → candidate → metric → mean with its interval
    strata: Mapping[str, Mapping[str, Mapping[str, Interval]]]
    folders: Mapping[str, str] = field(default_factory=dict)  # Candidate → folder of its trials, in the comparison's

    def change(self, name: str, against: str, metric: str) -> Change:
        """Return one change."""
        for found in self.changes:
            if (found.name, found.against, found.metric) == (name, against, metric):
                return found
        raise KeyError((name, against, metric))

    def as_json(self) -> dict[str, Any]:
        """Return JSON values; NaN becomes ``None``."""
        return {
            "candidates": list(self.candidates),
            "num_seeds": self.num_seeds,
            "levels": _plain(self.levels),
            "changes": [_plain(change._asdict()) for change in self.changes],
            "strata": _plain(self.strata),
            "units": [list(unit) for unit in self.units],
            "values": _plain(self.values),
            "folders": dict(self.folders),
        }


def collect(
    trials: Sequence[tuple[str, int, int, Scores]],
    references: Sequence[Mapping[str, Scores]],
    *,
    folders: Mapping[str, str] | None = None,
    num_resamples: int = 4000,
) -> Comparison:
    """Combine the scores of all trials and compare the candidates."""
    names = tuple(dict.fromkeys(name for name, _, _, _ in trials))
    num_seeds = 1 + max(seed for _, _, seed, _ in trials)
    first = [(fold, scores) for name, fold, seed, scores in trials if name == names[0] and seed == 0]
    units = tuple((context, target, fold) for fold, scores in first for context in scores for target in scores[context])
    values = {}
    for name in names:
        by_place = {(fold, seed): scores for other, fold, seed, scores in trials if other == name}
        values[name] = _table(units, [{fold: by_place[fold, seed] for fold, _ in first} for seed in range(num_seeds)])
    for name in REFERENCES:
        values[name] = _table(units, [{fold: part[name] for fold, part in enumerate(references)}])
    resamples = draw_resamples([target for _, target, _ in units], num_seeds=num_seeds, num=num_resamples)
    means = {name: _Means.of(table, values["baseline"], resamples) for name, table in values.items()}
    models = [name for name in names if name.rpartition(":")[2] in _MODELS]
    pairs = [(name, names[place - 1]) for place, name in enumerate(names) if place]
    pairs += [(name, other) for name in names for other in (*models, "baseline") if name != other]
    pairs = [pair for place, pair in enumerate(pairs) if pair[::-1] not in pairs[:place]]
    return Comparison(
        candidates=names,
        units=units,
        num_seeds=num_seeds,
        values=values,
        levels={name: found.levels() for name, found in means.items()},
        changes=tuple(
            change for pair in dict.fromkeys(pairs) for change in _changes(*pair, means[pair[0]], means[pair[1]])
        ),
        strata=_strata(values, units, num_seeds, num_resamples),
        folders=folders or {},
    )


def _table(units: Sequence[tuple[str, str, int]], seeds: Sequence[Mapping[int, Scores]]) -> dict[str, Floats]:
    """Return metric → (S, U); a unit without a score is NaN."""

    def of(scores: Mapping[int, Scores], unit: tuple[str, str, int], metric: str) -> float:
        value = scores[unit[2]].get(unit[0], {}).get(unit[1], {}).get(metric)
        return float("nan") if value is None else float(value)

    return {
        metric: np.array([[of(scores, unit, metric) for unit in units] for scores in seeds])
        for metric in (*_SCORED, "effect_size")
    }


class _Means(NamedTuple):
    """The mean of each metric, and of each resample."""

    value: dict[str, float]
    resampled: dict[str, Floats]

    @classmethod
    def of(cls, table: Mapping[str, Floats], baseline: Mapping[str, Floats], resamples: Resamples) -> _Means:
        whole = Resamples(np.ones((1, resamples.seeds_RS.shape[1])), np.ones((1, resamples.units_RU.shape[1])))
        value = {metric: float(resampled_means(table[metric], whole)[0]) for metric in _SCORED}
        resampled = {metric: resampled_means(table[metric], resamples) for metric in _SCORED}
        base = {metric: resampled_means(baseline[metric], whole) for metric in BEST}
        bases = {metric: resampled_means(baseline[metric], resamples) for metric in BEST}
        value["overall"] = float(_overall({metric: np.array([value[metric]]) for metric in BEST}, base)[0])
        resampled["overall"] = _overall(resampled, bases)
        return cls(value, resampled)

    def levels(self) -> dict[str, Interval]:
        return {metric: interval(self.value[metric], self.resampled[metric]) for metric in (*METRICS, _SCORED[-1])}


def _overall(means: Mapping[str, Floats], baseline: Mapping[str, Floats]) -> Floats:
    """Return :func:`pertcast.stats.metrics.overall` of each resample."""
    gained = []
    for metric, best in BEST.items():
        distance = best - baseline[metric]
        share = np.divide(means[metric] - baseline[metric], distance, out=np.zeros_like(distance), where=distance != 0)
        gained.append(np.maximum(share, 0))
    return np.asarray(np.mean(gained, axis=0))


def _changes(name: str, against: str, ours: _Means, theirs: _Means) -> list[Change]:
    found = []
    for metric in METRICS:
        difference = ours.value[metric] - theirs.value[metric]
        resampled_R = ours.resampled[metric] - theirs.resampled[metric]
        base, base_R = abs(theirs.value[metric]), np.abs(theirs.resampled[metric])
        percent_R = np.divide(100 * resampled_R, base_R, out=np.full(len(base_R), np.nan), where=base_R > 0)
        percent = interval(100 * difference / base if base > 0 else float("nan"), percent_R)
        found.append(Change(name, against, metric, interval(difference, resampled_R), percent))
    return found


def _strata(
    values: Mapping[str, Mapping[str, Floats]], units: Sequence[tuple[str, str, int]], num_seeds: int, num: int
) -> dict[str, dict[str, dict[str, Interval]]]:
    """Return the metrics by thirds of real effect size; empty for few units."""
    if len(units) < _UNITS_IN_STRATUM * len(_STRATA):
        return {}
    order = np.argsort(values["baseline"]["effect_size"][0], kind="stable")
    found: dict[str, dict[str, dict[str, Interval]]] = {}
    for stratum, places in zip(_STRATA, np.array_split(order, len(_STRATA)), strict=True):
        parts = {
            name: {metric: table[:, places] for metric, table in metrics.items()} for name, metrics in values.items()
        }
        resamples = draw_resamples([units[place][1] for place in places], num_seeds=num_seeds, num=num)
        found[stratum] = {
            name: _Means.of(table, parts["baseline"], resamples).levels() for name, table in parts.items()
        }
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return {"value": _plain(value.value), "low": _plain(value.low), "high": _plain(value.high)}
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


TITLES = {"mae": "MAE", "des": "DES", "pds": "PDS", "effect_correlation": "effect correlation", "overall": "overall"}
_LOWER_IS_BETTER = frozenset({"mae"})
_TOLERATED_PERCENT = 2.0


def verdict(comparison: Comparison) -> list[str]:
    """Return one sentence for each pair that was compared."""
    pairs = dict.fromkeys((change.name, change.against) for change in comparison.changes)
    return [_sentence(comparison, *pair) for pair in pairs]


def _sentence(comparison: Comparison, name: str, against: str) -> str:
    clear: list[str] = []
    unclear: list[str] = []
    for metric in METRICS:
        change = comparison.change(name, against, metric)
        (clear if change.difference.is_clear else unclear).append(_clause(change))
    other = "the training-mean baseline" if against == "baseline" else _shown(against)
    said = "; ".join([*clear, *(["unchanged: " + ", ".join(unclear)] if unclear else [])])
    harm = [
        TITLES[change.metric]
        for change in (comparison.change(name, against, metric) for metric in METRICS)
        if change.difference.is_clear
        and ((change.difference.value > 0) == (change.metric in _LOWER_IS_BETTER))
        and abs(change.percent.value) > _TOLERATED_PERCENT
    ]
    return f"{_shown(name)} against {other}: {said}." + (f" It does harm to {', '.join(harm)}." if harm else "")


def _shown(name: str) -> str:
    return name.upper() if name in ("c1", "c2", "c3", "c4") else name


def _clause(change: Change) -> str:
    title, percent, difference = TITLES[change.metric], change.percent, change.difference
    if change.metric == "mae":
        if not difference.is_clear:
            return f"{title} ({percent.value:+.1f} % {_range(percent, '.1f')})"
        low, high = sorted((abs(percent.low), abs(percent.high)))
        verb = "raises" if difference.value > 0 else "lowers"
        return f"{verb} {title} by {abs(percent.value):.1f} % [{low:.1f}, {high:.1f}]"
    if not difference.is_clear:
        return f"{title} ({difference.value:+.3f} {_range(difference, '.3f')})"
    low, high = sorted((abs(difference.low), abs(difference.high)))
    verb = "raises" if difference.value > 0 else "lowers"
    return f"{verb} {title} by {abs(difference.value):.3f} [{low:.3f}, {high:.3f}]"


def _range(found: Interval, form: str) -> str:
    return f"[{found.low:{form}}, {found.high:{form}}]"


def level_rows(levels: Mapping[str, Mapping[str, Interval]], names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a table: a name, and each metric with its interval."""
    for name in names:
        cells = []
        for metric in METRICS:
            found = levels[name][metric]
            form = ".4f" if metric == "mae" else ".3f"
            known = found.value == found.value
            cells.append(f"{found.value:{form}} {_range(found, form)}" if known else "–")
        yield (name, *cells)


def as_markdown(comparison: Comparison) -> str:
    """Return the whole comparison as Markdown."""
    targets = len({target for _, target, _ in comparison.units})
    folds = len({fold for _, _, fold in comparison.units})
    lines = [
        "# Comparison on held-out perturbations",
        "",
        f"{targets} targets, {len(comparison.units)} units (a target in a context), {folds} fold(s), "
        f"{comparison.num_seeds} seed(s). In brackets: 95 % intervals of a paired bootstrap over targets and seeds. "
        "Overall: against the training-mean baseline, each metric clipped at 0. Ceiling: one half of the real cells "
        "for the other. MAE: lower is better.",
        "",
        *(f"- {sentence}" for sentence in verdict(comparison)),
        "",
        *_level_table(comparison.levels, (*comparison.candidates, *REFERENCES)),
    ]
    for stratum, levels in comparison.strata.items():
        lines += ["", f"## The third of the targets with {stratum} effects", ""]
        lines += _level_table(levels, (*comparison.candidates, *REFERENCES))
    lines += ["", *(f"{name}: `{folder}`  " for name, folder in comparison.folders.items())]
    return "\n".join(lines).rstrip() + "\n"


def _level_table(levels: Mapping[str, Mapping[str, Interval]], names: tuple[str, ...]) -> list[str]:
    header = ("", *(TITLES[metric] for metric in METRICS))
    rows = [header, ("---",) * len(header), *level_rows(levels, names)]
    return ["| " + " | ".join(row) + " |" for row in rows]


_PANEL, _NAMES, _ROW, _TOP, _BOTTOM, _GAP = 190, 110, 24, 44, 34, 22
_BLUE, _GREY = "#0072b2", "#6b6b6b"


def draw_chart(comparison: Comparison) -> str:
    """Return the chart as SVG. References are grey; shapes distinguish them without colour."""
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
