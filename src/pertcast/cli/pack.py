"""``pertcast pack``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from pertcast.cli.options import GenesOption, RulesOption, SeasonOption, TargetsOption, parse_rules

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
    level: int = 3,
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
    """
    from pertcast.cli.console import Console
    from pertcast.submission.pack import pack as write

    rules = parse_rules(set_)
    print(write(file, out, season=season, genes=genes, targets=targets, rules=rules, level=level, progress=Console()))
