"""``pertcast sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from pertcast.cli.options import ForceOption, GenesOption, RulesOption, SeasonOption, parse_rules

__all__ = ["command", "sample"]


command = App(name="sample")


@command.default
def sample(
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    season: SeasonOption = "vcc2025",
    genes: GenesOption,
    targets: Annotated[Path, Parameter(name="--targets", help="The season's target list, pert_counts.csv.")],
    set_: RulesOption = None,
    force: ForceOption = False,
    seed: int = 0,
    counts_per_cell: int = 500,
) -> None:
    """Write a valid submission of random cells, to try the upload with; it scores as noise does.

    Example: `pertcast sample --season vcc2026 --genes gene_names.csv --targets pert_counts.csv -o try.vcc`

    Parameters
    ----------
    out
        The archive, a .vcc file.
    seed
        Equal seeds give equal cells.
    counts_per_cell
        Mean of a cell's sum of counts, which decides how large the archive is.
    """
    from pertcast.cli.console import Console
    from pertcast.submission.sample import sample as write

    rules, console = parse_rules(set_), Console()
    print(
        write(
            out,
            season=season,
            genes=genes,
            targets=targets,
            rules=rules,
            force=force,
            seed=seed,
            counts_per_cell=counts_per_cell,
            progress=console,
        )
    )
