"""Signals in training: Ctrl-C and SIGTERM wait for the end of the step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["interrupts"]


@contextmanager
def interrupts() -> Iterator[Callable[[], int]]:
    """Let Ctrl-C and SIGTERM wait for the end of the step; a second one does not wait.

    Only within training, and only where Python lets signals be handled (its main thread).
    """
    received: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, remember) for number in handled}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
