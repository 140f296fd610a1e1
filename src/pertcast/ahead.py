"""One item ahead: a thread works on the next item while the caller uses this one; order and results stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["one_ahead"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def one_ahead(items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
    """Yield ``work(item)`` for each item, in order; the next one is worked on while the caller has the last.

    Parameters
    ----------
    items
        Drawn from in the thread, one after the other.
    work
        Worth a thread where it lets go of the interpreter: reading, array arithmetic, a network.

    Examples
    --------
    >>> list(one_ahead(range(4), lambda number: number**2))
    [0, 1, 4, 9]
    """
    stream = iter(items)

    def next_result() -> tuple[Result] | None:
        for item in stream:
            return (work(item),)
        return None

    with ThreadPoolExecutor(1, thread_name_prefix="pertcast-ahead") as executor:
        pending: Future[tuple[Result] | None] = executor.submit(next_result)
        try:
            while (result := pending.result()) is not None:
                pending = executor.submit(next_result)
                yield result[0]
        finally:
            pending.cancel()
