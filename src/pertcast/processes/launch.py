"""Starts the processes of a command on this machine, shows what the first one tells, and ends them all together.

Invariants: one error ends all and is raised once; Ctrl-C and SIGTERM reach each process once, and what they then do
(finish a step, write a checkpoint) is waited for; when this process dies, the others end by themselves.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from pertcast import errors
from pertcast.errors import PertcastError
from pertcast.files.cpus import available_cpus
from pertcast.progress import Advance, Progress

__all__ = ["run_processes"]

_WORKER = "pertcast.processes.worker"
_GRACE_SECONDS = 15.0
_POLL_SECONDS = 0.2


def run_processes(work: str, job: Mapping[str, Any], *, num: int, progress: Progress) -> None:
    """Run a function in several new processes at once, and return when all have ended well.

    Parameters
    ----------
    work
        ``module:function``; called with the job and a progress. Its environment says which process it is, in the
        words of torchrun (``RANK``, ``WORLD_SIZE``, …), so that :func:`pertcast.processes.launched` and PyTorch know.
    job
        JSON values.
    num
        How many processes.
    progress
        Where the first one's tasks, notes and tables are shown.

    Raises
    ------
    PertcastError, OSError
        The error of the process that failed first.
    KeyboardInterrupt, SystemExit
        After Ctrl-C or SIGTERM, when all have ended.
    """
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
    """Hand SIGINT and SIGTERM on to the processes; yields the list of those that came."""
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
    """Shows the events of some processes until all have ended; when one fails, ends the others."""

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
        """Return the error of the process that failed first, if one did."""
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
        """Return the first error that says why; one that only lost contact knows nothing."""
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
                f"{place} was killed, most often because memory ran out; use fewer devices or smaller batches, "
                "and give the same command again to go on"
            )
        return PertcastError(f"{place} ended with code {code}; what it wrote above says why")
