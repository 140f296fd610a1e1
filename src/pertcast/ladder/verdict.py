"""A comparison in words and as a table: what each step changed, and what the numbers do not show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pertcast.ladder.comparison import METRICS, REFERENCES, Change, Comparison
from pertcast.stats.intervals import Interval

__all__ = ["TITLES", "as_markdown", "level_rows", "verdict"]

TITLES = {"mae": "MAE", "des": "DES", "pds": "PDS", "effect_correlation": "effect correlation", "overall": "overall"}
_LOWER_IS_BETTER = frozenset({"mae"})
_TOLERATED_PERCENT = 2.0


def verdict(comparison: Comparison) -> list[str]:
    """Return one sentence for each pair that was compared.

    A metric "is raised" or "is lowered" where the 95 % interval leaves 0 out, else it is "unchanged" as far as this
    comparison can see.
    """
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
        if change.difference.is_clear and _is_worse(change) and abs(change.percent.value) > _TOLERATED_PERCENT
    ]
    return f"{_shown(name)} against {other}: {said}." + (f" It does harm to {', '.join(harm)}." if harm else "")


def _shown(name: str) -> str:
    return name.upper() if name in ("c1", "c2", "c3", "c4") else name


def _is_worse(change: Change) -> bool:
    return (change.difference.value > 0) == (change.metric in _LOWER_IS_BETTER)


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
        *_table(comparison.levels, (*comparison.candidates, *REFERENCES)),
    ]
    for stratum, levels in comparison.strata.items():
        lines += ["", f"## The third of the targets with {stratum} effects", ""]
        lines += _table(levels, (*comparison.candidates, *REFERENCES))
    lines += ["", *(f"{name}: `{folder}`  " for name, folder in comparison.folders.items())]
    return "\n".join(lines).rstrip() + "\n"


def _table(levels: Mapping[str, Mapping[str, Interval]], names: tuple[str, ...]) -> list[str]:
    header = ("", *(TITLES[metric] for metric in METRICS))
    rows = [header, ("---",) * len(header), *level_rows(levels, names)]
    return ["| " + " | ".join(row) + " |" for row in rows]
