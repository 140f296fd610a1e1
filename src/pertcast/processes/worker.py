"""A process that ``run_processes`` started: does its share of a job and tells the first process's user what goes on.

The job comes as a line of JSON on stdin, which stays open: when it closes, whoever started this process is gone.
Events go out as lines of JSON on what was stdout; whatever a library prints goes to stderr.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, TextIO

from pertcast.errors import PertcastError
from pertcast.processes.ranks import LostProcessError
from pertcast.progress import SILENT, Advance, Progress

__all__ = ["main"]


class _Events:
    """A :class:`pertcast.progress.Progress` that sends everything to the process that shows it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._opened = stream, 0

    def send(self, kind: str, *values: Any) -> None:
        with suppress(BrokenPipeError):  # nobody listens any more; the watch over stdin ends this process
            self._stream.write(json.dumps([kind, *values]) + "\n")
            self._stream.flush()

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        self._opened += 1
        number = self._opened
        self.send("task", number, label, total, unit, done)

        def advance(amount: int, detail: str = "") -> None:
            self.send("advance", number, amount, detail)

        yield advance
        self.send("end", number)

    def note(self, text: str) -> None:
        self.send("note", text)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.send("table", title, list(header), [list(row) for row in rows])


def main() -> int:
    """Do the job that stdin names; return the exit code."""
    stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for category in (DeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)
    events = _Events(stream)
    try:
        _work(events)
    except (PertcastError, OSError) as error:
        events.send("error", _described(error))
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _work(events: _Events) -> None:
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, _, function = job.pop("work").partition(":")
    progress: Progress = events if os.environ["RANK"] == "0" else SILENT
    getattr(import_module(module), function)(job, progress)


def _end_with_parent() -> None:
    # unbuffered: a thread that held the buffer's lock would crash the interpreter's shutdown
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _described(error: PertcastError | OSError) -> dict[str, Any]:
    if isinstance(error, OSError):
        return {"errno": error.errno, "text": error.strerror or str(error), "filename": str(error.filename or "")}
    kind = "" if isinstance(error, LostProcessError) else type(error).__name__
    return {"kind": kind, "text": str(error)}


if __name__ == "__main__":
    sys.exit(main())
