"""Report progress. Stages call this interface; the command line draws it.

A stage takes ``progress: Progress = SILENT``. It opens a task, advances it, and notes what a user should read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Advance a task by `amount` of its units; `detail` is a short text beside the bar."""

    def __call__(self, amount: int, detail: str = "") -> None: ...


class Progress(Protocol):
    """The interface that stages report to."""

    def task(self, label: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Advance]:
        """Open a task of `total` units ("cells", "steps", "B"), of which `done` are done already."""
        ...

    def note(self, text: str) -> None:
        """Tell the user something that is not an error."""
        ...

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show a table, such as a plan or a result."""
        ...


class _Silent:
    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:  # noqa: ARG002
        yield lambda amount, detail="": None  # noqa: ARG005

    def note(self, text: str) -> None:
        """Do nothing."""

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Do nothing."""


SILENT: Progress = _Silent()
