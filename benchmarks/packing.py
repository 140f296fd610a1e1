"""Measures wall time and memory of pack and check against a season's official packer, in turns (A B A B).

Each run is a process of its own; ratios are of medians. Bytes written are those that the process and the children that
it waited for gave to the system (``wchar`` of ``/proc/PID/io``): temporary files count, even where they are removed.
What imports this stays small: the peak memory of a process is not counted below that of the one that started it.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

__all__ = ["Measured", "in_turns", "make_prediction", "measure", "table", "where_and_when"]


class Measured(NamedTuple):
    """One process: exit code, wall seconds, peak resident bytes of its largest process, bytes written."""

    code: int
    seconds: float
    peak_bytes: int
    written_bytes: int


def make_prediction(folder: Path, season: str, *, cells_per_target: int | None = None, form: str | None = None) -> int:
    """Write a prediction, or another form of it, in a process of its own; return its number of cells (0 for a form)."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("predictions.py")),
        "--season",
        season,
        "--out",
        str(folder),
    ]
    if cells_per_target is not None:
        command += ["--cells-per-target", str(cells_per_target)]
    if form is not None:
        command += ["--form", form]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout or 0)


def measure(command: Sequence[str]) -> Measured:
    """Run a command to its end and return what it took; its output goes nowhere."""
    start = time.perf_counter()
    process = subprocess.Popen(list(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    seconds = time.perf_counter() - start
    written = _written_bytes(process.pid)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Measured(process.returncode, seconds, usage.ru_maxrss * 1024, written)


def _written_bytes(pid: int) -> int:
    """Return what a process that has ended, but was not waited for, and its own children have written."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def in_turns(
    commands: Mapping[str, Sequence[str]], *, rounds: int, clean: Callable[[], None]
) -> dict[str, list[Measured]]:
    """Run the commands in turn, as often as asked for; `clean` is called before each."""
    found: dict[str, list[Measured]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            clean()
            found[name].append(measure(command))
            last = found[name][-1]
            print(
                f"{name:<28} exit {last.code} {last.seconds:7.1f} s {last.peak_bytes / 1e9:6.2f} GB "
                f"written {last.written_bytes / 1e9:6.2f} GB",
                flush=True,
            )
    return found


def table(found: Mapping[str, Sequence[Measured]]) -> str:
    """Return the runs as a Markdown table."""
    rows = ["| run | exit | wall, s (each run) | median | peak memory, GB | written, GB |", "|---|---|---|---|---|---|"]
    for name, runs in found.items():
        each = ", ".join(f"{run.seconds:.1f}" for run in runs)
        median = statistics.median(run.seconds for run in runs)
        peak, written = max(run.peak_bytes for run in runs) / 1e9, max(run.written_bytes for run in runs) / 1e9
        rows.append(f"| {name} | {runs[-1].code} | {each} | {median:.1f} | {peak:.2f} | {written:.2f} |")
    return "\n".join(rows)


def where_and_when() -> str:
    """Return the date, the commit, the machine and the versions."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "h5py", "zstandard"))
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit.stdout.strip() or 'unknown'}; {os.cpu_count()} cores, "
        f"{memory:.0f} GB, {platform.machine()}; Python {sys.version.split()[0]}, {packages}"
    )
