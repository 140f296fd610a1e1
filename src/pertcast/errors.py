"""What can go wrong, as one tree; a message says what was expected, what came, where, and what to do.

PertcastError                 anything that the user can mend; the command line prints it and exits with 1
├── ConfigError               an experiment file, a season's name, a value given with ``--set``
├── DataError                 training files, features, gene lists, target lists, stores
├── CheckpointError           runs, weights, manifests of what a stage wrote
└── SubmissionError           predictions and archives

A validator gathers every :class:`Problem` with its place; its caller raises one error that carries them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["CheckpointError", "ConfigError", "DataError", "PertcastError", "Problem", "SubmissionError"]


class Problem(NamedTuple):
    """One thing that is wrong.

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
        return f"{self.place}: {self.message}" + (f"; {self.remedy}" if self.remedy else "")


class PertcastError(Exception):
    """Base of all errors that a user can mend.

    Parameters
    ----------
    message
        A full sentence, or nothing when `problems` says it all.
    problems
        Every problem found, each with its place and remedy.
    """

    def __init__(self, message: str = "", *, problems: Sequence[Problem] = ()) -> None:
        self.problems = tuple(problems)
        if not message and len(self.problems) == 1:
            message = str(self.problems[0])
        elif self.problems:
            head = message or f"{len(self.problems)} problems"
            message = head + "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(message)


class ConfigError(PertcastError):
    """The experiment file or an option is wrong."""


class DataError(PertcastError):
    """A file that goes in is wrong."""


class CheckpointError(PertcastError):
    """A run, its weights or a manifest is wrong."""


class SubmissionError(PertcastError):
    """A prediction or an archive is wrong."""
