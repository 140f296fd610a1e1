"""Train a model on a store: a plain loop that can be interrupted at any moment and resumes exactly.

The loop is imported when `train` is first used.
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
