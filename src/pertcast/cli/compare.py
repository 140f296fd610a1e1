"""``pertcast compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from pertcast.cli.options import SetOption

__all__ = ["command", "compare"]


command = App(name="compare")


@command.default
def compare(
    *experiments: Path,
    out: Path,
    rungs: str | None = None,
    models: str = "",
    seeds: int = 5,
    folds: int = 0,
    jobs: int = 1,
    set_: SetOption = None,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Compare rungs, models and experiments on held-out perturbations, with intervals over targets and seeds.

    Every candidate is trained, and its cells made and scored with season 2025's metrics, on the same folds and seeds;
    what is done is not done again, so the same command goes on after an interrupt, or with more seeds. The result is a
    table and a verdict in words (comparison.md), a chart (comparison.svg) and all numbers (comparison.json).

    Example: `pertcast compare experiment.toml --rungs c1,c2,c3,c4 --seeds 5 --folds 5 --out comparison`

    Parameters
    ----------
    experiments
        Experiment files. Several are compared as they stand, one by its rungs.
    out
        The folder of the comparison.
    rungs
        Rungs of the ladder, with commas between them; "none" for the experiment as it stands. Default: all four for one
        experiment, none for several.
    models
        Models beside them, as `model.kind` names them, with commas between them: mean,ridge.
    seeds
        How many seeds, from 0.
    folds
        Into how many folds to divide the perturbations, each held out once; default: those that [fewshot] lists as
        test.
    jobs
        How many trials at a time; where there are accelerators, each takes the next one.
    json_
        Print everything as JSON.
    """
    import json

    from pertcast.cli.console import Console, stdout_table
    from pertcast.config import RUNGS
    from pertcast.errors import ConfigError
    from pertcast.ladder.compare import candidates_of
    from pertcast.ladder.compare import compare as compute
    from pertcast.ladder.comparison import METRICS, REFERENCES
    from pertcast.ladder.verdict import TITLES, level_rows, verdict

    if not experiments:
        raise ConfigError("pertcast compare: give at least one experiment file")
    if rungs is None:
        chosen = list(RUNGS) if len(experiments) == 1 else []
    else:
        chosen = [] if rungs == "none" else [name.strip() for name in rungs.split(",")]
    if unknown := [name for name in chosen if name not in RUNGS]:
        raise ConfigError(f"--rungs: expected some of {', '.join(RUNGS)}, got {', '.join(unknown)}")
    if seeds < 1 or jobs < 1:
        raise ConfigError(f"--seeds, --jobs: expected at least 1, got {seeds} and {jobs}")
    found = compute(
        candidates_of(experiments, rungs=chosen, models=[name.strip() for name in models.split(",") if name.strip()]),
        out,
        seeds=seeds,
        folds=folds,
        jobs=jobs,
        overrides=set_ or (),
        progress=Console(),
    )
    if json_:
        print(json.dumps(found.as_json(), indent=1))
        return
    stdout_table(
        f"{len(found.units)} held-out units, {found.num_seeds} seed(s)",
        ("", *(TITLES[metric] for metric in METRICS)),
        list(level_rows(found.levels, (*found.candidates, *REFERENCES))),
    )
    for sentence in verdict(found):
        print(f"· {sentence}")
    print(out / "comparison.md")
