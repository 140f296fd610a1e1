"""``pertcast score``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from pertcast.cli.options import RulesOption, SeasonOption, parse_rules

if TYPE_CHECKING:
    from pertcast.ladder.score import Score

__all__ = ["command", "print_score", "score"]


command = App(name="score")


@command.default
def score(
    predicted: Path,
    real: Path,
    /,
    *,
    season: SeasonOption = "vcc2025",
    baseline: Annotated[Path | None, Parameter(name="--baseline")] = None,
    train: Annotated[Path | None, Parameter(name="--train")] = None,
    ceiling: Annotated[bool, Parameter(name="--ceiling", negative="")] = False,
    set_: RulesOption = None,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Score predicted cells against held-out real ones with the season's official metrics.

    Season 2025: MAE, PDS and DES, equal to `cell-eval run --profile vcc`, and with a baseline the overall, equal to
    `cell-eval score`; what is computed of the real cells is kept for the next time under their content's hash. Season
    2026: through cell-eval2 (extra `pertcast[score]`).

    Example: `pertcast score prediction.h5ad held_out.h5ad --season vcc2025 --baseline baseline.h5ad`

    Parameters
    ----------
    predicted
        Predicted cells, an h5ad file with control cells (season 2026: without).
    real
        Real cells of the same targets and genes, with control cells.
    baseline
        What the overall is relative to: an h5ad (as `cell-eval baseline` writes), the JSON of an earlier score, or
        cell-eval's agg_results.csv.
    train
        Training cells, an h5ad file with control cells: the overall is relative to their mean, as `cell-eval baseline`
        makes it. In place of --baseline.
    ceiling
        Score one half of the real cells for the other half, too.
    json_
        Print the score as JSON.
    """
    from pertcast.cli.console import Console
    from pertcast.errors import ConfigError
    from pertcast.ladder.baseline import TrainingMean
    from pertcast.ladder.score import score as compute

    if train is not None and baseline is not None:
        raise ConfigError("--baseline and --train both say what the overall is relative to; give one of them")
    found = compute(
        predicted,
        real,
        season=season,
        rules=parse_rules(set_),
        baseline=TrainingMean(train) if train is not None else baseline,
        ceiling=ceiling,
        progress=Console(),
    )
    if json_:
        print(json.dumps(found.as_json(), indent=1))
    else:
        print_score(found)


def print_score(found: Score) -> None:
    """Print a score for people: the means, then every target."""
    from pertcast.cli.console import stdout_table

    columns = list(dict.fromkeys(name for values in found.targets.values() for name in values))
    stdout_table(
        f"{found.season}: {len(found.targets)} targets",
        ("target", *columns),
        [(name, *(_shown(values.get(column)) for column in columns)) for name, values in found.targets.items()],
    )
    beside = [("baseline", found.baseline), ("relative", found.relative), ("ceiling", found.ceiling)]
    there = [(name, values) for name, values in beside if values]
    names = list(dict.fromkeys([*found.overall, *(name for _, values in there for name in values)]))
    stdout_table(
        "in all",
        ("metric", "score", *(name for name, _ in there)),
        [(name, _shown(found.overall.get(name)), *(_shown(values.get(name)) for _, values in there)) for name in names],
    )
    for note in found.notes:
        print(f"· {note}")


def _shown(value: float | None) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
