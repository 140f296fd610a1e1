"""``pertcast demo``."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from pertcast.cli.options import SetOption

__all__ = ["command", "demo"]

command = App(name="demo")


@command.default
def demo(*, out: Path = Path("demo"), set_: SetOption = None) -> None:
    """Train STATE on 600 real H1 cells of the challenge, generate, assemble, check, pack, unpack, and report.

    Ends with a table: for each target the predicted cells, what is left of the target gene's expression, and how the
    predicted effect agrees with cells that training has not seen. At this depth only TMSB4X and MED12 have effects
    that repeat from one half of their cells to the other; the other three correlate with nothing but noise.

    Example: `pertcast demo --out demo`

    Parameters
    ----------
    out
        The folder for everything.
    """
    from pertcast.cli.check import print_report
    from pertcast.cli.console import Console, stdout_table
    from pertcast.demo import HEADER, run_demo
    from pertcast.errors import SubmissionError

    result = run_demo(out, overrides=set_ or (), progress=Console())
    print_report(result.outcome.report)
    stdout_table("Predicted cells beside held-out cells", HEADER, [row.cells() for row in result.rows])
    if not result.identical:
        raise SubmissionError(f"{result.unpacked}: unpacking did not give the prediction back; please report this")
    print(f"unpacked again, value for value: {result.unpacked}")
    print(f"the report, a page that opens offline: {result.report}")
    print(result.outcome.archive)
