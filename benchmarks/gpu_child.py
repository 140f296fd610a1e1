"""One measurement of benchmarks/gpu.py, in a process of its own; prints it as one line of JSON.

    python -m benchmarks.gpu_child product SIZE PRECISION...    the rate of one large product on this device
    python -m benchmarks.gpu_child train SECONDS STRETCH ...    `pertcast train ...`, ended SECONDS after its first step
    python -m benchmarks.gpu_child generate ...                 `pertcast generate ...`, to its end

The command is the user's, with nothing added to a step. The device is waited for once, at the end of the stretch that
is timed: the last STRETCH seconds. If the loop is ahead of the device as that begins, the rate comes out too low.
"""

from __future__ import annotations

import itertools
import json
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


def _run(label: str, seconds: float, arguments: list[str], waits: _Waits) -> tuple[list[Mark], list[str]]:
    """Run a command of pertcast; return the marks of the task `label`, and the notes."""
    from unittest import mock

    from pertcast.cli.app import main
    from pertcast.cli.console import Console

    marks: list[Mark] = []
    notes: list[str] = []

    def mark(amount: int) -> None:
        done = marks[-1].done if marks else 0
        marks.append(Mark(time.time(), done + amount, waits.seconds or 0.0))

    class Clock(Console):
        @contextmanager
        def task(self, label_: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
            with super().task(label_, total, unit, done) as advance:
                if label_ != label:
                    yield advance
                    return
                if label == "generate":
                    mark(0)

                def counted(amount: int, detail: str = "") -> None:
                    advance(amount, detail)
                    if not amount:
                        return
                    mark(amount)
                    is_enough = seconds and marks[-1].time - marks[0].time >= seconds
                    if is_enough or marks[-1].done == total:
                        _wait_for_device()
                        mark(0)
                    if is_enough:
                        raise _EnoughError

                yield counted

        def note(self, text: str) -> None:
            notes.append(text)
            super().note(text)

    with mock.patch("pertcast.cli.console.console", Clock), suppress(_EnoughError):
        try:
            main(arguments)
        except SystemExit as ended:
            if ended.code:
                raise
    return marks, notes


def summary(marks: list[Mark], stretch: float) -> dict[str, float]:
    """Return the rate and the share of waiting in the last `stretch` seconds, and when that rate was first reached."""
    times = [mark.time for mark in marks]
    end = marks[-1]
    start = marks[bisect_left(times, end.time - stretch)]
    if start.done == end.done:
        start = marks[0]
    seconds = end.time - start.time
    rate = (end.done - start.done) / seconds
    full = start.time
    for mark in marks:
        later = marks[min(bisect_left(times, mark.time + min(2.0, stretch / 4)), len(marks) - 1)]
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


def _train(seconds: float, stretch: float, arguments: list[str]) -> dict[str, Any]:
    waits = _Waits()
    waits.listen()
    marks, notes = _run("train", seconds, ["train", *arguments], waits)
    answer: dict[str, Any] = {**summary(marks, stretch), "notes": notes}
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
    marks, _ = _run("generate", 0, ["generate", *arguments], _Waits())
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
