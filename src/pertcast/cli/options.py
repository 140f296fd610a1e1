"""Options that several commands share, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

__all__ = [
    "DevicesOption",
    "ForceOption",
    "GenesOption",
    "ModelOption",
    "NodesOption",
    "RungOption",
    "SeasonOption",
    "SetOption",
    "TargetsOption",
    "parse_rules",
]

SetOption = Annotated[
    list[str] | None,
    Parameter(
        name="--set", negative="", help="Change one key of the experiment: --set train.steps=100. May be repeated."
    ),
]
RungOption = Annotated[
    Literal["c1", "c2", "c3", "c4"] | None,
    Parameter(
        name="--rung",
        negative="",
        help="A rung of the ladder, as weights of the loss: c1 energy distance, c2 and pseudobulk MAE, c3 and DE head, "
        "c4 and ranking. --set goes on top.",
    ),
]
DevicesOption = Annotated[
    int | None,
    Parameter(
        name="--devices",
        help="Devices of this machine: GPUs, or processes on a CPU. Torchrun and srun say it themselves: leave it out.",
    ),
]
NodesOption = Annotated[
    int | None,
    Parameter(name="--num-nodes", help="Machines; torchrun and srun, which they need, say it themselves."),
]
ModelOption = Annotated[
    Literal["state", "control", "mean", "ridge", "kernel_ridge", "knn"] | None,
    Parameter(
        name="--model",
        negative="",
        help="What learns: state (the network), or a baseline: control (no effect), mean (the mean effect), ridge, "
        "kernel_ridge, knn (on features). Short for --set model.kind=...; --set goes on top.",
    ),
]
ForceOption = Annotated[
    bool, Parameter(name="--force", negative="", help="Replace a file at --out that pertcast did not write.")
]
RulesOption = Annotated[
    list[str] | None,
    Parameter(
        name="--set",
        negative="",
        help="Override one rule of the season by name: --set num_genes=1000. May be repeated.",
    ),
]
SeasonOption = Annotated[str, Parameter(name="--season", help="Which season's rules: vcc2025 or vcc2026.")]
GenesOption = Annotated[Path, Parameter(name="--genes", help="The season's gene_names.csv.")]
TargetsOption = Annotated[Path | None, Parameter(name="--targets", help="The season's target list, pert_counts.csv.")]


def parse_rules(assignments: list[str] | None, *, option: str = "--set") -> dict[str, int | str]:
    """Return ``["num_genes=1000"]`` as ``{"num_genes": 1000}``.

    Raises
    ------
    ConfigError
        If one is not ``name=value``.
    """
    from pertcast.errors import ConfigError, Problem

    rules: dict[str, int | str] = {}
    problems = []
    for assignment in assignments or []:
        name, equals, value = (part.strip() for part in assignment.partition("="))
        if not (name and equals and value):
            example = {"--set": "num_genes=1000", "--where": "cell_type=H1"}[option]
            problems.append(Problem(f"{option} {assignment}", "expected name=value", f"for example {option} {example}"))
        rules[name] = int(value) if value.lstrip("-").isdigit() else value
    if problems:
        raise ConfigError(problems=problems)
    return rules
