"""A small training that several tests share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import PRECISION

EXPERIMENT = f"""
[datasets]
small = "small.h5ad"
[training]
small = "train"
[columns]
cell_type = "cell_type"
batch = "batch"
[prepare]
holdout_cells = 0.2
val_controls = 0.2
num_hvgs = 8
[model]
preset = "tiny"
set_size = 8
hidden = 16
heads = 2
layers = 1
feedforward = 16
[train]
steps = 12
sets_per_step = 2
learning_rate = 1e-3
precision = "{PRECISION}"
val_every = 4
checkpoint_every = 3
[generate]
cells = "model"
"""


class Watcher:
    """A progress that keeps notes and details, and does something once a step is done."""

    def __init__(self, at_step: int | None = None, act: Callable[[], None] = lambda: None) -> None:
        self.at_step, self.act = at_step, act
        self.notes: list[str] = []
        self.details: list[str] = []
        self.begun_at: list[int] = []

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Any]:
        if label in ("train", "adapt"):
            self.begun_at.append(done)
        position = done

        def advance(amount: int, detail: str = "") -> None:
            nonlocal position
            position += amount
            self.details.append(detail)
            if label in ("train", "adapt") and amount and position == self.at_step:
                self.act()

        yield advance

    def note(self, text: str) -> None:
        self.notes.append(text)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Do nothing."""


def lines(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] == kind]


def interrupt() -> None:
    raise KeyboardInterrupt
