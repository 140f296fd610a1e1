"""``pertcast check``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from pertcast.cli.options import GenesOption, RulesOption, SeasonOption, TargetsOption, parse_rules

if TYPE_CHECKING:
    from pertcast.stats.realism import Likeness
    from pertcast.submission.check import CheckReport
    from pertcast.submission.realism import RealismReport

__all__ = ["check", "command", "print_realism", "print_report"]


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
    against: Annotated[Path | None, Parameter(name="--against")] = None,
    where: Annotated[list[str] | None, Parameter(name="--where", negative="")] = None,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Name every problem of a prediction, with its place and what to do; exit code 1 if there is one.

    Example: `pertcast check prediction.h5ad --genes gene_names.csv --targets pert_counts_Validation.csv`

    Parameters
    ----------
    file
        The prediction, an h5ad file.
    against
        Real control cells, an h5ad file: says how real the cells look beside them (DE calls without an effect,
        variance, zeros, depth) and writes realism.json beside the prediction. The exit code does not depend on it.
    where
        Which cells of that file are compared, as column=label; may be repeated. Default: those of the context that
        the prediction's manifest names, where the file has several.
    json_
        Print the report as JSON.
    """
    from pertcast.cli.console import Console
    from pertcast.submission.check import check as examine

    report = examine(file, season=season, genes=genes, targets=targets, rules=parse_rules(set_), progress=Console())
    found = None
    if against is not None and report.facts.get("cells"):
        from pertcast.files.artefacts import require_replaceable, write_json
        from pertcast.submission.realism import realism

        labels = {column: str(label) for column, label in parse_rules(where, option="--where").items()}
        found = realism(file, against, season=season, rules=parse_rules(set_), where=labels or None, progress=Console())
        kept = file.with_name("realism.json")
        require_replaceable(kept, force=False)
        write_json(kept, {"made_by": "pertcast", **found.as_json()})
    if json_:
        print(json.dumps(report.as_json() | ({"realism": found.as_json()} if found else {}), indent=1))
        return 0 if report.ok else 1
    print_report(report)
    if found:
        print_realism(found)
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


def print_realism(report: RealismReport) -> None:
    """Print how real cells look: a line for each kind of cells, then what holds of those without an effect."""
    for part in report.contexts:
        print(
            f"\nhow real the cells look{f', context {part.context}' if part.context else ''}, beside {report.against}:"
        )
        rows: dict[str, Likeness | None] = {"real": part.real, "null": part.null, "targets": part.targets}
        names = {"real": "real controls", "null": "controls of the prediction", "targets": "targets, median"}
        for name, like in rows.items():
            if like is not None:
                depth = f", median depth {part.totals[name][1]:,.0f}" if name in part.totals else ""
                print(
                    f"  {names[name]}: {like.de_calls} DE genes, variance x{like.variance_ratio[1]:.2f}, "
                    f"zeros {100 * like.zero_difference[1]:+.1f} points, gene-gene r {like.correlation:.2f}{depth}"
                )
        for question, holds, evidence in part.verdicts:
            print(f"  {'✓' if holds else '✗'} {question}: {evidence}")
    for note in report.notes:
        print(f"· {note}")
