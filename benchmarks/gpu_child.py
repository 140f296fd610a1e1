"""One measurement of benchmarks/gpu.py, in a process of its own; prints it as one line of JSON.

    python -m benchmarks.gpu_child product SIZE PRECISION...    the rate of one large product on this device
    python -m benchmarks.gpu_child train WARM STRETCH ...       `pertcast train ...`, ended when it has been timed
    python -m benchmarks.gpu_child generate ...                 `pertcast generate ...`, to its end

The command is the user's, with nothing added to a step. STRETCH seconds are timed, and the device is waited for at both
ends of them only. They begin WARM seconds after the first step, or later: with step 150, since a training may compile
its steps once it is under way, but after ten times WARM at the latest.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pertcast.models.spec import StateSpec
    from pertcast.progress import Advance

_FIRST_STEPS = 150

__all__ = ["Mark", "measured_product", "network_flops", "summary"]


class Mark(NamedTuple):
    """When so many steps or cells were done, and for how long the loop had waited for its reader by then."""

    time: float
    done: int
    waited: float


class _EnoughError(Exception):
    """Ends a training that has been timed."""


def network_flops(spec: StateSpec, num_sets: int) -> int:
    """Return the floating-point operations of a step's products and attention, forwards and backwards."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from pertcast.models.state import StateTransition

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = StateTransition(spec)
        cells = torch.empty(num_sets, spec.set_size, spec.input_dim)
        codes = torch.empty(num_sets, spec.set_size, dtype=torch.long)
        prediction = network(cells, torch.empty(num_sets, spec.pert_dim), codes, codes[:, 0])
        prediction.log1p_BSG.sum().backward()
    return int(counter.get_total_flops())


def measured_product(precision: str, size: int) -> float:
    """Return the FLOP/s of one large square product on this machine."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    seconds = []
    try:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(20):
            _wait_for_device()
            start = time.perf_counter()
            a @ b
            _wait_for_device()
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * size**3 / min(seconds)


def _wait_for_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _products(size: int, precisions: list[str]) -> dict[str, Any]:
    import torch

    has_gpu = torch.cuda.is_available()
    size = size if has_gpu else min(size, 1024)
    return {
        "size": size,
        "device": torch.cuda.get_device_name() if has_gpu else f"CPU, {torch.get_num_threads()} thread(s)",
        "gpu": has_gpu,
        "torch": torch.__version__,
        "rates": {precision: measured_product(precision, size) for precision in precisions},
    }


class _Waits:
    """How long the main thread has waited for batches; None until it asks for one in a way that is known here."""

    def __init__(self) -> None:
        self.seconds: float | None = None

    def listen(self) -> None:
        """Count in `SetReader.batches`, or in `read_ahead`, whichever this version has."""
        for name in ("batches", "loop", "stage"):
            with suppress(ImportError):
                import_module(f"pertcast.train.{name}")
        modules = [module for name, module in sys.modules.items() if name.startswith("pertcast.train")]
        reader: Any = getattr(sys.modules.get("pertcast.train.batches"), "SetReader", None)
        for owner, name in ((reader, "batches"), *((module, "read_ahead") for module in modules)):
            if callable(getattr(owner, name, None)):
                setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, reads: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
        def counted(*arguments: Any, **named: Any) -> Iterator[Any]:
            stream = reads(*arguments, **named)
            batches = iter(stream)
            try:
                while True:
                    start = time.perf_counter()
                    try:
                        item = next(batches)
                    except StopIteration:
                        return
                    if threading.current_thread() is threading.main_thread():
                        self.seconds = (self.seconds or 0.0) + time.perf_counter() - start
                    yield item
            finally:
                getattr(stream, "close", int)()

        return counted


class _Clock:
    """Marks of a training until it has been timed, or of a generation."""

    def __init__(self, waits: _Waits, warm: float = math.inf, stretch: float = math.inf) -> None:
        self._waits, self._warm, self._stretch = waits, warm, stretch
        self.marks: list[Mark] = []
        self.start: int | None = None  # the mark that the timed stretch begins with

    def mark(self, amount: int) -> None:
        """Note that so much more is done; at the end of the stretch, end the training."""
        done = self.marks[-1].done if self.marks else 0
        self.marks.append(Mark(time.time(), done + amount, self._waits.seconds or 0.0))
        seconds = self.marks[-1].time - self.marks[0].time
        if self.start is None:
            if seconds >= self._warm and (done >= _FIRST_STEPS or seconds >= 10 * self._warm):
                self._mark_device()
                self.start = len(self.marks) - 1
        elif self.marks[-1].time - self.marks[self.start].time >= self._stretch:
            self._mark_device()
            raise _EnoughError

    def _mark_device(self) -> None:
        _wait_for_device()
        self.marks.append(self.marks[-1]._replace(time=time.time()))


def _run(label: str, arguments: list[str], clock: _Clock) -> list[str]:
    """Run a command of pertcast with the task `label` on the clock; return the notes."""
    from unittest import mock

    from pertcast.cli.app import main
    from pertcast.cli.console import Console

    notes: list[str] = []

    class Shown(Console):
        @contextmanager
        def task(self, label_: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
            with super().task(label_, total, unit, done) as advance:
                if label_ == "generate":
                    clock.mark(0)

                def counted(amount: int, detail: str = "") -> None:
                    advance(amount, detail)
                    if amount:
                        clock.mark(amount)

                yield counted if label_ == label else advance

        def note(self, text: str) -> None:
            notes.append(text)
            super().note(text)

    with mock.patch("pertcast.cli.console.console", Shown), suppress(_EnoughError):
        try:
            main(arguments)
        except SystemExit as ended:
            if ended.code:
                raise
    return notes


def summary(marks: list[Mark], first: int) -> dict[str, float]:
    """Return the rate and the share of waiting from the mark `first` to the last, and when that rate was reached."""
    start, end = marks[first], marks[-1]
    seconds = end.time - start.time
    rate = (end.done - start.done) / seconds
    times, full = [mark.time for mark in marks], start.time
    for mark in marks[:first]:
        later = marks[min(bisect_left(times, mark.time + min(2.0, seconds / 4)), len(marks) - 1)]
        if later.time > mark.time and (later.done - mark.done) / (later.time - mark.time) >= 0.9 * rate:
            full = mark.time
            break
    return {
        "rate": rate,
        "timed": end.done - start.done,
        "waiting": (end.waited - start.waited) / seconds,
        "first_at": marks[0].time,
        "full_at": full,
    }


def _train(warm: float, stretch: float, arguments: list[str]) -> dict[str, Any]:
    waits = _Waits()
    waits.listen()
    clock = _Clock(waits, warm, stretch)
    notes = _run("train", ["train", *arguments], clock)
    answer: dict[str, Any] = {**summary(clock.marks, clock.start or 0), "notes": notes}
    if waits.seconds is None:
        answer["waiting"] = None
    import torch

    from pertcast.config import load_experiment
    from pertcast.data.store import Store
    from pertcast.models.spec import spec_for

    # what the device must have, with the memory that CUDA graphs keep
    answer["memory"] = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    given = [value for name, value in itertools.pairwise(arguments) if name == "--set"]
    experiment = load_experiment(Path(arguments[0]), given)
    store = Store.open(Path(arguments[arguments.index("--store") + 1]))
    width = len(store.hvg if experiment.model.output == "hvg" else store.genes)
    spec = spec_for(
        experiment.model,
        num_genes=width,
        input_dim=width,
        output_dim=width,
        pert_dim=len(store.perts),
        num_batches=len(store.batches),
        num_contexts=len(store.contexts),
    )
    sets = experiment.train.sets_per_step
    return {**answer, "sets": sets, "precision": experiment.train.precision, "flops": network_flops(spec, sets)}


def _generate(arguments: list[str]) -> dict[str, Any]:
    clock = _Clock(_Waits())
    _run("generate", ["generate", *arguments], clock)
    marks = clock.marks
    seconds = marks[-1].time - marks[0].time
    return {"rate": marks[-1].done / seconds, "timed": marks[-1].done, "first_at": marks[1].time}


def main() -> None:
    """Measure, print, and end without waiting for threads that still compile."""
    kind, *rest = sys.argv[1:]
    if kind == "product":
        answer = _products(int(rest[0]), rest[1:])
    elif kind == "train":
        answer = _train(float(rest[0]), float(rest[1]), rest[2:])
    else:
        answer = _generate(rest)
    print(json.dumps(answer), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
