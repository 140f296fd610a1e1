"""A store and an experiment in, a run out: a plain loop that can be stopped at any moment and goes on exactly.

The loop and all that it needs are loaded when `train` is first asked for: an import of a run needs none of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pertcast.train.stage import train

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    if name != "train":
        raise AttributeError(f"module 'pertcast.train' has no attribute {name!r}")
    from pertcast.train.stage import train

    return train
