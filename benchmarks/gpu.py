"""Trains and generates at real size on a GPU; prints FLOP utilisation, sets a second, waiting for cells, peak memory.

Cells are simulated (18,080 genes, about 7,000 seen in a cell). Each row is one training of `state_sm` at one precision,
with and without torch.compile; its time is that of the steps after the first quarter. FLOPs are those of the network's
products and attention, forwards and backwards, as torch counts them, without the loss; utilisation is their share of
what this device does in one large product at the same precision, measured here, and of its data sheet where known.

    python -m benchmarks.gpu --out out/gpu             on a GPU, about 15 minutes
    python -m benchmarks.gpu --out out/gpu --small     anywhere, under a minute: small network, few genes
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from benchmarks.simulate import simulate
from torch.utils.flop_counter import FlopCounterMode

from pertcast.config import load_experiment
from pertcast.data.prepare import prepare
from pertcast.data.store import Store
from pertcast.generate import generate
from pertcast.models.run_folder import open_run
from pertcast.models.spec import StateSpec
from pertcast.models.state import StateTransition
from pertcast.progress import SILENT, Advance
from pertcast.train import loop as training_loop
from pertcast.train import train
from pertcast.train.batches import read_ahead

__all__ = ["GPU", "SMALL", "Row", "Setting", "measure", "measured_peak", "network_flops", "rows_of", "write_data"]

# Dense products, no sparsity, in FLOP/s; from NVIDIA's data sheets.
_SHEETS = {
    "H200": {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12},
    "H100": {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
}
_TOML = """
[datasets]
simulated = "cells.h5ad"
[training]
simulated = "train"
[columns]
batch = "batch"
context = "H1"
[prepare]
num_hvgs = {num_hvgs}
[model]
preset = "{preset}"
[train]
checkpoint_every = 1000000
[submission]
targets = "targets.csv"
[submission.rules]
num_genes = {num_genes}
num_targets = {num_targets}
max_cells = 10000000
"""


@dataclass(frozen=True)
class Setting:
    """How large everything is."""

    preset: str = "state_sm"
    num_genes: int = 18_080
    num_hvgs: int = 2_000
    num_targets: int = 30
    cells_per_target: int = 300
    generated: int = 1_000
    umi: float = 54_000
    sets_per_step: tuple[int, ...] = (8, 32)
    steps: int = 60
    product: int = 8_192


GPU = Setting()
SMALL = Setting(
    preset="tiny",
    num_genes=300,
    num_hvgs=60,
    num_targets=3,
    cells_per_target=40,
    generated=40,
    umi=2_000,
    sets_per_step=(2,),
    steps=8,
    product=256,
)


class Row(NamedTuple):
    """What one training and one generation took."""

    input: str
    sets_per_step: int
    precision: str
    compiled: bool
    first_step_seconds: float
    sets_per_second: float
    waiting: float
    flops_per_second: float
    peak_train_bytes: int
    generated_per_second: float


def write_data(out: Path, setting: Setting) -> Path:
    """Write cells, targets and the experiment; return the experiment's path."""
    out.mkdir(parents=True, exist_ok=True)
    genes = [f"gene{number}" for number in range(setting.num_genes)]
    targets = genes[:: max(1, setting.num_genes // setting.num_targets)][: setting.num_targets]
    size = setting.cells_per_target
    path = out / "cells.h5ad"
    simulate(path, genes=genes, targets=targets, cells_per_target=size, num_controls=10 * size, umi=setting.umi)
    lines = [f"{target},{setting.generated}\n" for target in targets]
    (out / "targets.csv").write_text("target_gene,n_cells\n" + "".join(lines))
    names = {"num_genes", "num_hvgs", "num_targets", "preset"}
    text = _TOML.format(**{name: getattr(setting, name) for name in names})
    (out / "experiment.toml").write_text(text)
    return out / "experiment.toml"


def network_flops(spec: StateSpec, num_sets: int) -> int:
    """Return the floating-point operations of a step's products and attention, forwards and backwards."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = StateTransition(spec)
        cells = torch.empty(num_sets, spec.set_size, spec.input_dim)
        codes = torch.empty(num_sets, spec.set_size, dtype=torch.long)
        prediction = network(cells, torch.empty(num_sets, spec.pert_dim), codes, codes[:, 0])
        prediction.log1p_BSG.sum().backward()
    return int(counter.get_total_flops())


def measured_peak(precision: str, size: int) -> float:
    """Return the FLOP/s of one large square product on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = min(_seconds(lambda: a @ b) for _ in range(10))
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * size**3 / seconds


def _seconds(work: Callable[[], object]) -> float:
    _wait_for_device()
    start = time.perf_counter()
    work()
    _wait_for_device()
    return time.perf_counter() - start


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class _Clock:
    """A progress that notes when each step ended, and how long the loop had waited for cells by then."""

    def __init__(self) -> None:
        self.times, self.waited, self.waits = [time.perf_counter()], 0.0, [0.0]

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:  # noqa: ARG002
        """Note every advance of training."""
        if label == "train":
            self.times = [time.perf_counter()]

        def advance(amount: int, detail: str = "") -> None:  # noqa: ARG001
            if label == "train" and amount:
                _wait_for_device()
                self.times.append(time.perf_counter())
                self.waits.append(self.waited)

        yield advance

    note, table = SILENT.note, SILENT.table

    def listening(self, read_ahead: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """Return `read_ahead` such that waiting for it is counted."""

        def timed(*arguments: Any, threads: int = 1) -> Iterator[Any]:
            stream = read_ahead(*arguments, threads=threads)
            while True:
                start = time.perf_counter()
                try:
                    item = next(stream)
                except StopIteration:
                    return
                self.waited += time.perf_counter() - start
                yield item

        return timed


def measure(experiment: Path, setting: Setting, row: Row) -> Row:
    """Train and generate as a row says, and return it with what was measured."""
    folder = experiment.parent
    settings = [
        f"train.steps={setting.steps}",
        f"train.sets_per_step={row.sets_per_step}",
        f"train.precision={row.precision}",
        f"train.compile={str(row.compiled).lower()}",
        f"model.input={row.input}",
        f"model.output={row.input}",
        'generate.unpredicted_genes="control"',
    ]
    resolved, clock = load_experiment(experiment, settings), _Clock()
    store = prepare(resolved, folder / "store")
    shutil.rmtree(folder / "run", ignore_errors=True)
    shutil.rmtree(folder / "parts", ignore_errors=True)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with mock.patch.object(training_loop, "read_ahead", clock.listening(read_ahead)):
        run = train(resolved, store, folder / "run", progress=clock)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    skipped = max(1, setting.steps // 4)
    seconds = clock.times[-1] - clock.times[skipped]
    steps = setting.steps - skipped
    generation = _seconds(lambda: generate(run, folder / "parts"))
    return row._replace(
        first_step_seconds=clock.times[1] - clock.times[0],
        sets_per_second=steps * row.sets_per_step / seconds,
        waiting=(clock.waits[-1] - clock.waits[skipped]) / seconds,
        flops_per_second=network_flops(open_run(run).network, row.sets_per_step) * steps / seconds,
        peak_train_bytes=peak,
        generated_per_second=setting.num_targets * setting.generated / generation,
    )


def rows_of(setting: Setting, *, compiled: tuple[bool, ...], precisions: tuple[str, ...]) -> Iterator[Row]:
    """Yield every row to measure."""
    for source in ("hvg", "genes"):
        for num_sets in setting.sets_per_step:
            for precision in precisions:
                for switch in compiled:
                    yield Row(source, num_sets, precision, switch, 0, 0, 0, 0, 0, 0)


def _print(row: Row, peak: float) -> None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    sheet = next((rates[row.precision] for model, rates in _SHEETS.items() if model in name), None)
    of_sheet = f"{row.flops_per_second / sheet:8.1%}" if sheet else f"{'-':>8}"
    print(
        f"{row.input:6} {row.sets_per_step:4} {row.precision:5} {'yes' if row.compiled else 'no':>8} "
        f"{row.first_step_seconds:10.2f} {row.sets_per_second:9.1f} {row.waiting:8.1%} "
        f"{row.flops_per_second / 1e12:8.3f} {row.flops_per_second / peak:8.1%} {of_sheet} "
        f"{row.peak_train_bytes / 2**30:9.2f} {row.generated_per_second:9.0f}",
        flush=True,
    )


def main() -> None:
    """Measure every row and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", action="store_true", help="a small network and few genes, on any machine")
    parser.add_argument("--compile", choices=("yes", "no", "both"), help="default: both on a GPU, no elsewhere")
    parser.add_argument("--precision", nargs="+", default=["fp32", "tf32", "bf16"])
    parser.add_argument("--steps", type=int)
    asked = parser.parse_args()
    setting = SMALL if asked.small else GPU
    setting = setting if asked.steps is None else replace(setting, steps=asked.steps)
    choice = asked.compile or ("both" if torch.cuda.is_available() and not asked.small else "no")
    compiled = {"yes": (True,), "no": (False,), "both": (False, True)}[choice]
    out = asked.out or Path(tempfile.mkdtemp(prefix="pertcast-gpu-"))
    experiment = write_data(out, setting)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    peaks = {precision: measured_peak(precision, setting.product) for precision in asked.precision}
    print(f"device: {device}; torch {torch.__version__}; network {setting.preset}; {setting.steps} steps")
    for precision, peak in peaks.items():
        print(f"one product of {setting.product} x {setting.product}, {precision}: {peak / 1e12:.2f} TFLOP/s")
    print(
        f"{'input':6} {'sets':>4} {'prec.':5} {'compiled':>8} {'1st step s':>10} {'sets/s':>9} {'waiting':>8} "
        f"{'TFLOP/s':>8} {'of prod.':>8} {'of sheet':>8} {'peak GiB':>9} {'cells/s':>9}"
    )
    for row in rows_of(setting, compiled=compiled, precisions=tuple(asked.precision)):
        _print(measure(experiment, setting, row), peaks[row.precision])
    cells = Store.open(out / "store").num_cells
    print(f"cells in the store: {cells:,}; cells/s: generated and written, the network's start included")


if __name__ == "__main__":
    main()
