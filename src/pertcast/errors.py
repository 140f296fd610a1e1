"""The exception tree. A message says what was expected, what was found, where, and what to do.

    PertcastError                 anything that the user can fix; the command line prints it and exits with 1
    ├── ConfigError               an experiment file, a season's name, a value given with ``--set``
    ├── DataError                 training files, features, gene lists, target lists, stores
    ├── CheckpointError           runs, weights, manifests of what a stage wrote
    └── SubmissionError           predictions and archives

A validator gathers every :class:`Problem` with its place; its caller raises one error with all of them.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

READ_ERRORS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    zlib.error,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    MemoryError,
    OverflowError,
)
"""What the readers of torch, NumPy and Python raise on files that are cut short or of another kind."""


class Problem(NamedTuple):
    """One problem: its place, what is wrong, and the remedy.

    Parameters
    ----------
    place
        Where: a file, and the key, row, column or position in it.
    message
        What was expected and what came instead.
    remedy
        What the user can do about it; may be empty where the message says it already.
    """

    place: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        """Return ``place: message; remedy`` on one line."""
        place = f"{self.place}: " if self.place else ""
        return f"{place}{self.message}" + (f"; {self.remedy}" if self.remedy else "")


class PertcastError(Exception):
    """Base of all errors that a user can fix.

    Parameters
    ----------
    message
        A full sentence, or nothing when `problems` says it all.
    problems
        Every problem found, each with its place and remedy.
    """

    def __init__(self, message: str = "", *, problems: Sequence[Problem] = ()) -> None:
        self.problems = tuple(problems)
        self.head = message
        if not message and len(self.problems) == 1:
            message = str(self.problems[0])
        elif self.problems:
            head = message or f"{len(self.problems)} problems"
            message = head + "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(message)


class ConfigError(PertcastError):
    """The experiment file or an option is wrong."""


class DataError(PertcastError):
    """An input file is wrong."""


class CheckpointError(PertcastError):
    """A run, its weights or a manifest is wrong."""


class SubmissionError(PertcastError):
    """A prediction or an archive is wrong."""


class Problems:
    """Collect the problems of independent checks, then raise them all at once.

    >>> problems = Problems()
    >>> for name in ("A", "B"):
    ...     with problems.collect():
    ...         raise DataError(f"{name} is missing")
    >>> problems.raise_if_any()
    Traceback (most recent call last):
    pertcast.errors.DataError: 2 problems
      - A is missing
      - B is missing
    """

    def __init__(self) -> None:
        self.found: list[Problem] = []
        self._errors: list[PertcastError] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep the problems of an error raised inside the block, and continue after it."""
        try:
            yield
        except PertcastError as error:
            self._errors.append(error)
            if error.head:
                self.found.append(Problem("", error.head))
            self.found += error.problems

    def raise_if_any(self) -> None:
        """Raise one error with all problems, or the only one unchanged."""
        told = sum(bool(error.head) + len(error.problems) for error in self._errors)
        if len(self._errors) == 1 and told == len(self.found):
            raise self._errors[0]
        if self.found:
            kind = type(self._errors[0]) if self._errors else PertcastError
            raise kind(problems=self.found)
