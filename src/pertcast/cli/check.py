"""``pertcast check``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from pertcast.cli.options import GenesOption, RulesOption, SeasonOption, TargetsOption, parse_rules

if TYPE_CHECKING:
    from pertcast.submission.check import CheckReport

__all__ = ["check", "command", "print_report"]


command = App(name="check")


@command.default
def check(
    file: Path,
    /,
    *,
    season: SeasonOption = "vcc2025",
    genes: GenesOption,
    targets: TargetsOption = None,
    set_: RulesOption = None,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Name every problem of a prediction, with its place and what to do; exit code 1 if there is one.

    Example: `pertcast check prediction.h5ad --genes gene_names.csv --targets pert_counts_Validation.csv`

    Parameters
    ----------
    file
        The prediction, an h5ad file.
    json_
        Print the report as JSON.
    """
    from pertcast.cli.console import Console
    from pertcast.submission.check import check as examine

    report = examine(file, season=season, genes=genes, targets=targets, rules=parse_rules(set_), progress=Console())
    if json_:
        print(json.dumps(report.as_json(), indent=1))
    else:
        print_report(report)
    return 0 if report.ok else 1


def print_report(report: CheckReport) -> None:
    """Print a report for people: the pre-flight questions, then every problem."""
    for item in report.checklist:
        mark = {True: "✓", False: "✗", None: "–"}[item.ok]
        print(f"{mark} {item.question}: {item.evidence}")
    for note in report.notes:
        print(f"· {note}")
    for problem in report.problems:
        print(f"  - {problem}")
    print("valid" if report.ok else f"not valid: {len(report.problems)} problem(s)")
