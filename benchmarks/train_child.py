"""Prepares a store and trains on it, and writes when each step ended: the twin of state_child.py.

python benchmarks/train_child.py times.json experiment.toml store run [train.steps=40 ...]
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pertcast.progress import Advance

STARTED = time.time()


class Clock:
    """A progress that notes when each training step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:  # noqa: ARG002
        """Note every advance of training."""

        def advance(amount: int, detail: str = "") -> None:  # noqa: ARG001
            if label == "train" and amount:
                self.times.append(time.time() - STARTED)

        yield advance

    def note(self, text: str) -> None:
        """Print it."""
        print(text)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Do nothing."""


def main() -> None:
    """Prepare, train, write the times."""
    from pertcast.config import load_experiment
    from pertcast.data.prepare import prepare

    # both as the command line does
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    out, experiment_path, store, run, *overrides = sys.argv[1:]
    clock = Clock()
    experiment = load_experiment(Path(experiment_path), overrides)
    prepared = prepare(experiment, Path(store), progress=clock)

    from pertcast.train import train

    train(experiment, prepared, Path(run), progress=clock)
    Path(out).write_text(json.dumps(clock.times))


if __name__ == "__main__":
    main()
