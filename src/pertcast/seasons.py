"""The rules of each challenge season, as frozen data with their source. A new season is one new entry.

No other file knows a season's name, a limit, a column or a label. A rule may be overridden by name for data that is not
the challenge's, such as a small panel: ``season("vcc2025", {"num_genes": 1000})``.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from pertcast.errors import ConfigError, Problem

PERT_COLUMN = "target_gene"
CONTROL_LABEL = "non-targeting"

_SITE = "virtualcellchallenge.org, submission rules"
_PREP = "cell-eval 0.8.2, `cell-eval prep`"
_VCC = "vcc-cli 0.3.0, `vcc prep`"


@dataclass(frozen=True)
class Season:
    """The rules of one season.

    Attributes
    ----------
    name, title
        How commands call it, and how people do.
    num_genes
        Genes of a prediction, in the order of the season's gene list.
    genes_header
        First line of the gene list when it is a header.
    pert_column, control_label
        The obs column of the target gene, and the label of control cells in it.
    context_column, contexts
        The obs column of the context and the allowed sets of contexts; ``None`` where a season has one context.
    controls
        Whether control cells must be, or must not be, in the prediction.
    num_targets
        Targets in the season's list.
    cells_per_target
        Exact cells of each target and context, or ``None`` where the target list says.
    max_cells
        Cells of a prediction, controls included.
    scales
        Which of ``log1p`` and ``counts`` a prediction may be on; never both in one file.
    max_cell_sum, max_stored_values
        The cap on a cell's sum of counts, and on stored entries of the matrix: explicit zeros count in a sparse one,
        zeros do not in a dense one.
    max_log1p
        What every log1p value is below.
    zero_targets
        Whether a target may have no value above 0 in any of its cells.
    members
        Names of the members of the archive, in order.
    watermark
        Content of ``watermark.txt`` where the archive has one.
    packer, scorer
        The official tools.
    sources
        Rule → where it is written.
    overridden
        Rules that the user has changed, in the order given; printed every time they are used.
    """

    name: str
    title: str
    num_genes: int
    genes_header: str | None
    controls: Literal["required", "forbidden"]
    num_targets: int
    cells_per_target: int | None
    max_cells: int
    scales: tuple[str, ...]
    members: tuple[str, ...]
    packer: str
    scorer: str
    pert_column: str = PERT_COLUMN
    control_label: str = CONTROL_LABEL
    context_column: str | None = None
    contexts: tuple[tuple[str, ...], ...] | None = None
    max_cell_sum: int | None = None
    max_stored_values: int | None = None
    max_log1p: float | None = None
    zero_targets: Literal["allowed", "forbidden"] = "allowed"
    watermark: str | None = None
    sources: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    overridden: tuple[str, ...] = ()

    def override(self, rules: Mapping[str, object]) -> Season:
        """Return the season with some rules changed by name.

        Raises
        ------
        ConfigError
            If a name is not a rule that can be overridden, or a value is of another type; all at once.
        """
        problems = []
        for name, value in rules.items():
            place = f"rule {name!r} of season {self.name}"
            if name not in _OVERRIDABLE:
                near = difflib.get_close_matches(name, _OVERRIDABLE, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"the rules are {', '.join(sorted(_OVERRIDABLE))}"
                problems.append(Problem(place, "no such rule", hint))
            elif not isinstance(value, _OVERRIDABLE[name]) or isinstance(value, bool):
                problems.append(
                    Problem(
                        place,
                        f"expected {_OVERRIDABLE[name].__name__}, got {value!r}",
                        f"set {name} to a {_OVERRIDABLE[name].__name__}",
                    )
                )
            elif isinstance(value, int) and value < 1:
                problems.append(
                    Problem(place, f"expected a whole number of at least 1, got {value}", "give a larger one")
                )
            elif name == "contexts" and self.contexts is None:
                problems.append(Problem(place, "the season has one context", "leave the rule away"))
            elif name == "contexts" and (
                "" in _names(str(value)) or len({*_names(str(value))}) < len(_names(str(value)))
            ):
                problems.append(
                    Problem(place, f"expected different names with commas between them, got {value!r}", "write A,B,C")
                )
            elif name == "controls" and value not in ("required", "forbidden"):
                problems.append(
                    Problem(place, f"expected 'required' or 'forbidden', got {value!r}", "use one of the two")
                )
        if problems:
            raise ConfigError(problems=problems)
        if not rules:
            return self
        changed = tuple(dict.fromkeys((*self.overridden, *rules)))
        values = {name: (_names(str(value)),) if name == "contexts" else value for name, value in rules.items()}
        return dataclasses.replace(self, **values, overridden=changed)  # type: ignore[arg-type]

    def describe_overrides(self) -> list[str]:
        """Return one line for each overridden rule, with the season's own value."""
        original = SEASONS[self.name]
        return [
            f"rule {name} overridden: {_shown(getattr(self, name))} "
            f"(season {self.name}: {_shown(getattr(original, name))})"
            for name in self.overridden
        ]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _shown(value: object) -> str:
    return " or ".join(map(",".join, value)) if isinstance(value, tuple) else str(value)


_OVERRIDABLE: Mapping[str, type] = MappingProxyType(
    {
        "num_genes": int,
        "num_targets": int,
        "max_cells": int,
        "cells_per_target": int,
        "control_label": str,
        "controls": str,
        "contexts": str,
        "max_cell_sum": int,
        "max_stored_values": int,
    }
)

SEASONS: Mapping[str, Season] = MappingProxyType(
    {
        "vcc2025": Season(
            name="vcc2025",
            title="Virtual Cell Challenge 2025",
            num_genes=18_080,
            genes_header=None,
            controls="required",
            num_targets=50,
            cells_per_target=None,
            max_cells=100_000,
            scales=("log1p", "counts"),
            max_log1p=15.0,
            members=("pred.h5ad.zst", "watermark.txt"),
            watermark="vcc-prep",
            packer="cell-eval prep",
            scorer="cell-eval run --profile vcc",
            sources=MappingProxyType(
                {
                    "num_genes": f"{_PREP}; gene_names.csv",
                    "control_label": _PREP,
                    "controls": f"{_PREP}; {_SITE}",
                    "max_cells": _SITE,
                    "scales": _PREP,
                    "max_log1p": _PREP,
                    "members": _PREP,
                    "watermark": _PREP,
                    "num_targets": "pert_counts_Validation.csv",
                }
            ),
        ),
        "vcc2026": Season(
            name="vcc2026",
            title="Virtual Cell Challenge 2026",
            num_genes=18_533,
            genes_header="gene_name",
            controls="forbidden",
            num_targets=300,
            cells_per_target=400,
            max_cells=400_000,
            scales=("counts",),
            members=("meta.json", "pred.h5ad.zst"),
            packer="vcc prep",
            scorer="cell-eval2 --preset vcc2026",
            context_column="context",
            contexts=(("A", "B", "C"), ("D", "E", "F")),
            max_cell_sum=1_000_000,
            max_stored_values=4_750_000_000,
            zero_targets="forbidden",
            sources=MappingProxyType(
                {
                    "num_genes": f"{_VCC}; gene_names.csv",
                    "controls": _VCC,
                    "contexts": _VCC,
                    "cells_per_target": _VCC,
                    "max_cells": _VCC,
                    "max_cell_sum": _VCC,
                    "max_stored_values": _VCC,
                    "zero_targets": _VCC,
                    "members": _VCC,
                    "num_targets": "pert_counts.csv",
                }
            ),
        ),
    }
)


def season(name: str, rules: Mapping[str, object] | None = None) -> Season:
    """Return a season by name, with some of its rules overridden.

    Raises
    ------
    ConfigError
        If there is no such season or rule.

    Examples
    --------
    >>> season("vcc2025").num_genes
    18080
    >>> season("vcc2025", {"num_genes": 1000}).overridden
    ('num_genes',)
    """
    if name not in SEASONS:
        raise ConfigError(
            f"season {name!r} is not known: expected one of {', '.join(SEASONS)}; pass one of these names"
        )
    return SEASONS[name].override(rules or {})
