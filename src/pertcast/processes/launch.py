"""Start, watch and stop the local processes of a command.

Invariants: one error ends all processes and is raised once. Ctrl-C and SIGTERM reach each process once, and their
reaction (finish a step, write a checkpoint) is waited for. When this process dies, the others end by themselves.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, Literal, NamedTuple, TextIO

from pertcast import errors
from pertcast.errors import ConfigError, PertcastError
from pertcast.files.resources import available_cpus
from pertcast.progress import SILENT, Advance, Progress

_WORKER = "pertcast.processes.launch"
_GRACE_SECONDS = 15.0
_POLL_SECONDS = 0.2


def run_processes(work: str, job: Mapping[str, Any], *, num: int, progress: Progress) -> None:
    """Run a function in several new processes, and return when all have finished."""
    port, processes = _free_port(), []
    try:
        for rank in range(num):
            processes.append(_start(rank, num, port))
        with _forwarded(processes) as received:
            for process in processes:
                assert process.stdin is not None
                with suppress(BrokenPipeError):
                    process.stdin.write(json.dumps({"work": work, **job}) + "\n")
                    process.stdin.flush()
            failure = _Watch(processes, progress).until_the_end()
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with suppress(BrokenPipeError):
                        stream.close()
    if received:
        raise KeyboardInterrupt if received[0] == signal.SIGINT else SystemExit(128 + received[0])
    if failure is not None:
        raise failure


def _start(rank: int, num: int, port: int) -> subprocess.Popen[str]:
    environment = {
        "OMP_NUM_THREADS": str(max(1, available_cpus() // num)),
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(num),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(num),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # in a session of its own, so that a terminal's Ctrl-C comes to this process alone, which hands it on once
    return subprocess.Popen(
        [sys.executable, "-m", _WORKER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _forwarded(processes: list[subprocess.Popen[str]]) -> Iterator[list[int]]:
    """Forward SIGINT and SIGTERM to the processes; yield the list of received signals."""
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            with suppress(ProcessLookupError):
                process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Watch:
    """Show the events of the processes until all have ended; when one fails, end the others."""

    def __init__(self, processes: list[subprocess.Popen[str]], progress: Progress) -> None:
        self._processes, self._progress = processes, progress
        self._events: SimpleQueue[tuple[int, list[Any] | None]] = SimpleQueue()
        self._tasks: dict[int, tuple[ExitStack, Advance]] = {}
        self._told: dict[int, dict[str, Any]] = {}
        self._failed: list[int] = []
        for rank, process in enumerate(processes):
            threading.Thread(target=self._listen, args=(rank, process), daemon=True).start()

    def _listen(self, rank: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with suppress(json.JSONDecodeError):
                self._events.put((rank, json.loads(line)))
        self._events.put((rank, None))

    def until_the_end(self) -> PertcastError | OSError | None:
        """Return the error of the process that failed first, or ``None``."""
        running, deadline = set(range(len(self._processes))), float("inf")
        with ExitStack() as tasks:
            while running:
                if time.monotonic() > deadline:
                    for rank in running:
                        self._processes[rank].kill()
                try:
                    rank, event = self._events.get(timeout=_POLL_SECONDS)
                except Empty:
                    continue
                if event is not None:
                    self._show(rank, event, tasks)
                    continue
                running.discard(rank)
                if self._processes[rank].wait() and not self._failed:
                    deadline = time.monotonic() + _GRACE_SECONDS
                    for other in running:
                        self._processes[other].terminate()
                if self._processes[rank].returncode:
                    self._failed.append(rank)
        return self._failure()

    def _show(self, rank: int, event: list[Any], tasks: ExitStack) -> None:
        kind, *values = event
        if kind == "error":
            self._told[rank] = values[0]
        elif kind == "task":
            number, *described = values
            stack = tasks.enter_context(ExitStack())
            self._tasks[number] = stack, stack.enter_context(self._progress.task(*described))
        elif kind == "advance":
            self._tasks[values[0]][1](values[1], detail=values[2])
        elif kind == "end":
            self._tasks.pop(values[0])[0].close()
        elif kind == "note":
            self._progress.note(*values)
        elif kind == "table":
            self._progress.table(*values)

    def _failure(self) -> PertcastError | OSError | None:
        """Return the first error that is a cause; one that only lost contact is none."""
        if not self._failed:
            return None
        told = [self._told[rank] for rank in self._failed if rank in self._told and self._told[rank].get("kind") != ""]
        if told and "errno" in told[0]:
            return OSError(told[0]["errno"], told[0]["text"], told[0]["filename"] or None)
        if told:
            kind = getattr(errors, told[0]["kind"], PertcastError)
            return kind(told[0]["text"])
        rank = next((rank for rank in self._failed if rank not in self._told), self._failed[0])
        code, place = self._processes[rank].returncode, f"process {rank + 1} of {len(self._processes)}"
        if code == -signal.SIGKILL:
            return PertcastError(
                f"{place} was killed, usually because memory ran out; use fewer devices or smaller batches, "
                "and run the same command again to resume"
            )
        return PertcastError(f"{place} ended with code {code}; its output above says why")


class Ranks(NamedTuple):
    """The rank of this process among those of a command."""

    rank: int = 0  # Its number, and how many there are on all machines
    size: int = 1
    local_rank: int = 0  # Its number on its machine, and how many there are on it
    local_size: int = 1
    num_nodes: int = 1  # Machines
    launcher: Literal["torchrun", "srun"] = "torchrun"  # Who started them

    def __str__(self) -> str:
        """Return ``process 2 of 4``, counted from 1."""
        return f"process {self.rank + 1} of {self.size}"


class LostProcessError(PertcastError):
    """Another process has ended, and its own error says why."""


_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# SLURM_NTASKS and SLURM_PROCID are there in a batch script, too; a step's number only where srun started the process.
_SRUN = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NNODES")
_SRUN_STEP = "SLURM_STEP_ID"


def launched(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """Return this process's ranks, or ``None`` if no launcher has started several.

    >>> launched({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    Ranks(rank=3, size=4, local_rank=1, local_size=2, num_nodes=2, launcher='torchrun')
    >>> launched({}) is None
    True
    """
    if all(name in environment for name in _TORCHRUN):
        rank, size, local_rank, local_size = _numbers(environment, _TORCHRUN)
        num_nodes, launcher = size // max(local_size, 1), "torchrun"
    elif _SRUN_STEP in environment and all(name in environment for name in _SRUN):
        rank, size, local_rank, num_nodes = _numbers(environment, _SRUN)
        local_size, launcher = size // max(num_nodes, 1), "srun"
    else:
        return None
    if size <= 1:
        return None
    if local_size * num_nodes != size or not local_rank < local_size:
        raise ConfigError(
            f"{launcher}: expected equally many processes on each machine, got {size} on {num_nodes}; "
            "start as many on each as it has devices (srun: --ntasks-per-node)"
        )
    return Ranks(rank, size, local_rank, local_size, num_nodes, "torchrun" if launcher == "torchrun" else "srun")


def _numbers(environment: Mapping[str, str], names: tuple[str, ...]) -> list[int]:
    try:
        return [int(environment[name]) for name in names]
    except ValueError:
        found = ", ".join(f"{name}={environment[name]!r}" for name in names)
        raise ConfigError(f"expected numbers in the launcher's variables, got {found}; unset them") from None


class _Events:
    """A :class:`pertcast.progress.Progress` that sends everything to the parent process."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._opened = stream, 0

    def send(self, kind: str, *values: Any) -> None:
        with suppress(BrokenPipeError):  # the parent has ended; the thread that reads stdin ends this process
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
    """Do the job on stdin and return the exit code."""
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
