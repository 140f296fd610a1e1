"""``pertcast pack``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from pertcast.cli.options import ForceOption, GenesOption, RulesOption, SeasonOption, TargetsOption, parse_rules

__all__ = ["command", "pack"]


command = App(name="pack")


@command.default
def pack(
    file: Path,
    /,
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    season: SeasonOption = "vcc2025",
    genes: GenesOption,
    targets: TargetsOption = None,
    set_: RulesOption = None,
    force: ForceOption = False,
    level: int = 3,
    cross_check: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Check a prediction and pack it as the season's archive; what `check` refuses is not packed.

    The archive is read back and compared before it takes its name.

    Example: `pertcast pack prediction.h5ad --season vcc2025 --genes gene_names.csv -o prediction.vcc`

    Parameters
    ----------
    file
        The prediction, an h5ad file.
    out
        The archive, a .vcc file.
    level
        How hard zstd tries, 1 to 19: 3 is what the official packers use, 1 is faster and larger.
    cross_check
        Have the season's official packer pack the same file, where it is installed, and compare what both packed.
    """
    from pertcast.cli.console import Console
    from pertcast.submission.check.whole import resolve_season
    from pertcast.submission.cross_check import cross_check as compare
    from pertcast.submission.cross_check import find_packer
    from pertcast.submission.pack import pack as write

    rules, console = parse_rules(set_), Console()
    in_force = resolve_season(season, rules)
    if cross_check:
        find_packer(in_force)
    archive = write(
        file,
        out,
        season=season,
        genes=genes,
        targets=targets,
        rules=rules,
        force=force,
        level=level,
        progress=console,
    )
    if cross_check:
        found = compare(file, archive, season=in_force, genes=genes, targets=targets, progress=console)
        equal = "the same values" if not found.largest_difference else f"values within {found.largest_difference:.1e}"
        print(f"cross-checked: `{found.packer}` packs {equal} for {found.num_cells:,} x {found.num_genes:,}")
    print(archive)
