"""What the processes of test_processes.py do; imported by them alone."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pertcast.errors import DataError
from pertcast.processes import LostProcessError
from pertcast.progress import Progress


def share(job: Mapping[str, Any], progress: Progress) -> None:
    """Write down who this is, and show some progress."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    Path(job["out"], os.environ["RANK"]).write_text(" ".join(os.environ[name] for name in names))
    sys.stdout.write("a library that prints\n")
    progress.note("begun")
    with progress.task("all", 4, "cells", done=1) as advance:
        advance(3, detail="three")
    progress.table("facts", ["a"], [["1"]])


def fail(job: Mapping[str, Any], progress: Progress) -> None:
    """Let the second process fail in some way while the first waits for it."""
    if os.environ["RANK"] == "0":
        try:
            time.sleep(60)
        finally:
            raise LostProcessError("another process has ended")
    if job["how"] == "error":
        raise DataError("cells.h5ad: broken")
    if job["how"] == "disk":
        raise OSError(errno.ENOSPC, "No space left on device", "store")
    if job["how"] == "bug":
        raise ZeroDivisionError
    os.kill(os.getpid(), signal.SIGKILL)


def wait(job: Mapping[str, Any], progress: Progress) -> None:
    """Wait for Ctrl-C, and finish something after it."""
    try:
        progress.note("waiting")
        time.sleep(60)
    except KeyboardInterrupt:
        Path(job["out"], os.environ["RANK"]).write_text("finished")
        raise
