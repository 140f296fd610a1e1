"""Work ahead: threads work on what comes next while the caller uses what there is; order and results stay the same."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["one_ahead"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def one_ahead(items: Iterable[Item], work: Callable[[Item], Result], *, threads: int = 1) -> Iterator[Result]:
    """Yield ``work(item)`` for each item, in order; the next one is worked on while the caller has the last.

    Parameters
    ----------
    items
        Drawn from in the threads, one after the other.
    work
        Worth a thread where it lets go of the interpreter: reading, array arithmetic, a network.
    threads
        How many next items are worked on at once.

    Examples
    --------
    >>> list(one_ahead(range(4), lambda number: number**2, threads=3))
    [0, 1, 4, 9]
    """
    stream = iter(items)

    def next_result(may_draw: threading.Event, has_drawn: threading.Event) -> list[Result]:
        may_draw.wait()
        try:
            item = next(stream)
        except StopIteration:
            return []
        finally:
            has_drawn.set()
        return [work(item)]

    last_drawn = threading.Event()
    last_drawn.set()
    pending: deque[Future[list[Result]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="pertcast-ahead") as executor:

        def submit() -> None:
            nonlocal last_drawn
            before, last_drawn = last_drawn, threading.Event()
            pending.append(executor.submit(next_result, before, last_drawn))

        try:
            for _ in range(threads):
                submit()
            while result := pending.popleft().result():
                submit()
                yield result.pop()  # the caller alone holds it: it goes when the caller lets go of it
        finally:
            # The newest first: none that has begun waits for one that never will.
            while pending:
                pending.pop().cancel()
