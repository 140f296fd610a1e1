"""Show progress on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console as RichConsole
from rich.progress import BarColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from pertcast.processes import launched
from pertcast.progress import SILENT, Advance, Progress

_SECONDS_BETWEEN_LINES = 10.0


def _amount(number: float, unit: str) -> str:
    if unit == "B":
        for prefix in ("", "k", "M", "G"):
            if number < 1000 or prefix == "G":
                return f"{number:.1f} {prefix}B" if prefix else f"{number:.0f} B"
            number /= 1000
    return f"{number:,.0f} {unit}"


class _Rate(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        """Draw ``done/total unit · rate · detail``."""
        unit = task.fields["unit"]
        total = f" of {_amount(task.total, unit)}" if task.total else ""
        rate = f" · {_amount(task.speed, unit)}/s" if task.speed else ""
        detail = f" · {task.fields['detail']}" if task.fields["detail"] else ""
        return Text(f"{_amount(task.completed, unit)}{total}{rate}{detail}")


class Console:
    """Show a :class:`pertcast.progress.Progress` to people."""

    def __init__(self) -> None:
        self._rich = RichConsole(stderr=True, highlight=False)

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """Show a task: a live bar on a terminal; elsewhere a line at the start, at intervals and at the end."""
        if self._rich.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                _Rate(),
                TimeRemainingColumn(),
            )
            with Bars(*columns, console=self._rich) as bars:
                number = bars.add_task(label, total=total, completed=done, unit=unit, detail="")

                def draw(amount: int, detail: str = "") -> None:
                    bars.update(number, advance=amount)
                    if detail:
                        bars.update(number, detail=detail)

                yield draw
        else:
            yield from self._lines(label, total, unit, done)

    def _lines(self, label: str, total: int, unit: str, done: int) -> Iterator[Advance]:
        start = last = time.monotonic()
        now, text = done, ""

        def line(amount: int, detail: str = "") -> None:
            nonlocal now, last, text
            now, text = now + amount, detail or text
            if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                rate = (now - done) / (last - start)
                left = f", {(total - now) / rate:,.0f} s left" if rate else ""
                self._say(
                    f"{label}: {_amount(now, unit)} of {_amount(total, unit)}, {_amount(rate, unit)}/s{left} {text}"
                )

        self._say(f"{label}: {_amount(total, unit)}" + (f", {_amount(done, unit)} done already" if done else ""))
        yield line
        self._say(f"{label}: {_amount(now, unit)} in {time.monotonic() - start:.1f} s {text}")

    def _say(self, text: str) -> None:
        print(text.rstrip(), file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Show one sentence."""
        self._rich.print(f"· {text}", markup=False, soft_wrap=True)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show a table on stderr."""
        self._rich.print(_table(title, header, rows))


def console() -> Progress:
    """Return where a command shows its progress; with several processes, only the first shows any."""
    ranks = launched()
    return Console() if ranks is None or ranks.rank == 0 else SILENT


def say(result: object) -> None:
    """Print the result of a command; with several processes, only the first prints."""
    ranks = launched()
    if ranks is None or ranks.rank == 0:
        print(result)


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def stdout_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table as the result of a command."""
    RichConsole(highlight=False).print(_table(title, header, rows))
