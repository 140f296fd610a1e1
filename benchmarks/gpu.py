"""Measures training and generation at real size on a GPU, beside arc-state's training step; writes one dated table.

Cells are simulated: 18,080 genes, about 7,000 seen in a cell. Each row is one `pertcast train`, as users run it, in a
process of its own. It is timed once it is under way, with no synchronisation added; the time to its first step is
counted from the start of the process. FLOPs are those of the network's products and attention, forwards and backwards,
as torch counts them, without the loss; beside them is their share of what this device does in one large product.
arc-state's step has its batch on the device already; the faster of its two precisions counts.

    python -m benchmarks.gpu --data out/gpu --peer SITE_PACKAGES --peer-script peer_step.py      on a GPU, 8 minutes
    python -m benchmarks.gpu --data out/gpu --prepare-only                                       its cells alone
    python -m benchmarks.gpu --small                                                             anywhere, a minute
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "gpu.md"
_PRECISIONS = ("bf16", "tf32", "fp32")
_START_SECONDS = 15.0  # before a first step, and to compile
_LONGEST_SECONDS = 150.0
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
val_every = 1000000
checkpoint_every = 1000000
[generate]
unpredicted_genes = "control"
[submission]
targets = "targets.csv"
num_controls = 1
[submission.rules]
num_genes = {num_genes}
num_targets = {num_targets}
max_cells = 10000000
"""


@dataclass(frozen=True)
class Setting:
    """How large everything is, and for how long a training is timed."""

    preset: str = "state_sm"
    num_genes: int = 18_080
    num_hvgs: int = 2_000
    num_targets: int = 30
    cells_per_target: int = 256
    generated: int = 2_000
    umi: float = 54_000
    sets: tuple[int, ...] = (32, 128, 8)
    warm: float = 4  # seconds between the first step of a training and the stretch that is timed, at least
    stretch: float = 8
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
    sets=(2,),
    warm=0.3,
    stretch=1,
    product=256,
)


class Row(NamedTuple):
    """What one row measures: a training, arc-state's step, or a generation."""

    kind: str  # "train", "peer" or "generate"
    genes: str  # "hvg" or "genes"
    sets: int = 0
    precision: str = "bf16"
    settings: tuple[str, ...] = ()  # of the training, beside its genes, sets and precision
    at_least: int = 0  # sets or cells a second, on one H100
    times: float = 0  # as fast as arc-state's step, at least


def rows_of(setting: Setting) -> list[Row]:
    """Return every row, the most telling first."""
    from pertcast.config import TrainConfig

    fields = TrainConfig.model_fields
    compiles = "false" if fields["compile"].default else "true"
    few, both = setting.sets[0], ("hvg", "genes")
    trained = {"hvg": Row("train", "hvg", few, at_least=8_000, times=4)}
    trained["genes"] = Row("train", "genes", few, at_least=2_700, times=2.5)
    rows = [*trained.values(), *(Row("peer", genes, few) for genes in both), Row("generate", "genes", at_least=10_000)]
    if len(setting.sets) == 1:
        return rows
    _, many, fewest = setting.sets
    rows += [Row("train", "hvg", many, at_least=11_000), Row("train", "genes", many, at_least=3_500)]
    if "cells" in fields:
        rows += [Row("train", genes, few, settings=("train.cells=host",)) for genes in both]
    rows += [Row("train", genes, fewest) for genes in both]
    rows.append(Row("train", "hvg", few, settings=(f"train.compile={compiles}",)))
    return [*rows, *(Row("train", "hvg", few, precision) for precision in ("tf32", "fp32"))]


def write_data(out: Path, setting: Setting) -> Path:
    """Write targets, a prepared store and the experiment, unless they are there; return the experiment's path."""
    from benchmarks.simulate import simulate

    from pertcast.config import load_experiment
    from pertcast.data.prepare import prepare

    names = ("num_genes", "num_hvgs", "num_targets", "preset")
    text = _TOML.format(**{name: getattr(setting, name) for name in names})
    experiment, cells = out / "experiment.toml", out / "cells.h5ad"
    if experiment.exists():
        if experiment.read_text() != text:
            raise SystemExit(f"--data {out}: it holds other data; give another folder")
        if (out / "store").is_dir() and not cells.exists():
            return experiment
    out.mkdir(parents=True, exist_ok=True)
    experiment.write_text(text)
    genes = [f"gene{number}" for number in range(setting.num_genes)]
    targets = genes[:: max(1, setting.num_genes // setting.num_targets)][: setting.num_targets]
    lines = [f"{target},{setting.generated}\n" for target in targets]
    (out / "targets.csv").write_text("target_gene,n_cells\n" + "".join(lines))
    size = setting.cells_per_target
    simulate(cells, genes=genes, targets=targets, cells_per_target=size, num_controls=10 * size, umi=setting.umi)
    prepare(load_experiment(experiment), out / "store")
    # the store is all that is read from here on; that they are gone says that it is whole
    cells.unlink()
    return experiment


class _FailedError(Exception):
    """A row that could not be measured, in a few words."""


@dataclass
class Bench:
    """One run of the benchmark: what it measures with, and what it has measured."""

    setting: Setting
    folder: Path
    until: float  # on the clock of time.monotonic
    extra: Sequence[str] = ()  # settings for every training
    peer: Path | None = None
    peer_script: Path | None = None
    answers: dict[Row, dict[str, Any] | str] = field(default_factory=dict)

    def child(self, arguments: Sequence[str], name: str = "child", *, seconds: float = _LONGEST_SECONDS) -> Any:
        """Run a Python process; return the JSON of its last line that holds an object, and when it started."""
        log = self.folder / f"{name}.log"
        paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        started = time.time()
        with log.open("w") as file:
            into = partial(subprocess.run, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
            try:
                code = into([sys.executable, *arguments], timeout=seconds, check=False).returncode
            except subprocess.TimeoutExpired as error:
                raise _FailedError(f"ended after {seconds:.0f} s") from error
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if code:
            print("\n".join(lines[-30:]), file=sys.stderr)
            raise _FailedError(f"failed: {lines[-1][:150] if lines else code}")
        answers = [line for line in lines if line.startswith("{")]
        return {"started": started, **json.loads(answers[-1])} if answers else {}

    def measure(self, row: Row, name: str) -> dict[str, Any] | str:
        """Measure one row, or say in a few words why not."""
        left = self.until - time.monotonic()
        watched = self.setting.warm + self.setting.stretch if row.kind == "train" else 0.0
        if row.kind == "peer" and (self.peer is None or self.peer_script is None):
            return "not measured"
        if left < watched + _START_SECONDS:
            return "skipped: the time is up"
        try:
            return getattr(self, f"_{row.kind}")(row, name, min(left + _START_SECONDS, _LONGEST_SECONDS))
        except _FailedError as error:
            return str(error)
        except (KeyError, ValueError) as error:
            return f"failed: its last line is no answer ({error!r})"

    def _settings(self, row: Row) -> Iterable[str]:
        sets = f"train.sets_per_step={row.sets or self.setting.sets[0]}"
        named = (f"model.input={row.genes}", f"model.output={row.genes}", f"train.precision={row.precision}", sets)
        for setting in (*named, *row.settings, *self.extra):
            yield from ("--set", setting)

    def _trains(self, row: Row, run: str) -> list[str]:
        folder = self.folder
        shutil.rmtree(folder / run, ignore_errors=True)
        where = ["--store", str(folder / "store"), "--out", str(folder / run)]
        return [str(folder / "experiment.toml"), *where, *self._settings(row)]

    def _train(self, row: Row, name: str, limit: float) -> dict[str, Any]:
        times = [str(self.setting.warm), str(self.setting.stretch)]
        command = ["-m", "benchmarks.gpu_child", "train", *times, *self._trains(row, "run")]
        try:
            return self.child(command, name, seconds=limit)
        finally:
            shutil.rmtree(self.folder / "run", ignore_errors=True)

    def _peer(self, row: Row, name: str, limit: float) -> dict[str, Any]:
        genes = self.setting.num_hvgs if row.genes == "hvg" else self.setting.num_genes
        given = [str(self.peer_script), str(self.peer), "--genes", str(genes), "--sets", str(row.sets)]
        found = [
            self.child([*given, "--precision", way], f"{name}-{way}", seconds=limit / 2) for way in ("medium", "bf16")
        ]
        best = max(found, key=lambda answer: answer["sets_per_second"])
        return {"rate": best["sets_per_second"], "precision": best["precision"]}

    def _generate(self, row: Row, name: str, limit: float) -> dict[str, Any]:
        """Train for one step, which is not measured, and generate."""
        last = ("--set", "train.steps=1", "--set", "train.compile=false")
        try:
            self.child(["-m", "pertcast", "train", *self._trains(row, "trained"), *last], f"{name}-run", seconds=limit)
            command = ["-m", "benchmarks.gpu_child", "generate", str(self.folder / "trained")]
            return self.child([*command, "--out", str(self.folder / "parts")], name, seconds=limit)
        finally:
            for left in ("trained", "parts"):
                shutil.rmtree(self.folder / left, ignore_errors=True)

    def name(self, row: Row) -> str:
        """Return what a row is called in the table."""
        genes = f"{self.setting.num_hvgs:,} HVGs" if row.genes == "hvg" else f"{self.setting.num_genes:,} genes"
        if row.kind == "generate":
            return f"generation, {genes}"
        words = [f"{row.sets} sets", genes, *row.settings, *([row.precision] if row.precision != "bf16" else [])]
        return ("arc-state's step, " if row.kind == "peer" else "") + ", ".join(words)

    def cells(self, row: Row, machine: dict[str, Any]) -> list[str]:
        """Return a row of the table, as far as it goes."""
        answer = self.answers.get(row, "not yet")
        if isinstance(answer, str):
            return [self.name(row), answer]
        has_bars = "H100" in machine["device"] and self.setting == GPU
        rate = answer["rate"] * answer.get("sets", 1)
        said = f"{rate:,.0f}" + (f" (at least {row.at_least:,})" if has_bars and row.at_least else "")
        if row.kind == "peer":
            return [self.name(row), f"{said}, {answer['precision']}"]
        first = f"{answer['first_at'] - answer['started']:.1f}"
        if row.kind == "generate":
            return [self.name(row), said, "", first, "", "", f"{answer['timed']:,}"]
        peer, times = self.answers.get(Row("peer", row.genes, row.sets)), ""
        if row.times:
            times = f"{rate / peer['rate']:.2f}" if isinstance(peer, dict) else "not measured"
            times += f" (at least {row.times})" if has_bars else ""
        flops, memory = answer["flops"] * answer["rate"], answer["memory"]
        product = machine["rates"].get(answer["precision"], machine["rates"][row.precision])
        return [
            self.name(row),
            said,
            times,
            first,
            f"{answer['full_at'] - answer['started']:.0f}",
            "-" if answer["waiting"] is None else f"{answer['waiting']:.1%}",
            f"{answer['timed']:,}",
            f"{flops / 1e12:.1f}",
            f"{flops / product:.0%}",
            f"{memory / 2**30:.1f}" if memory else "-",
        ]

    def table(self, rows: Sequence[Row], machine: dict[str, Any], *, left_out: Sequence[str]) -> str:
        """Return the whole page: the machine, a table of rows, notes."""
        rates = ", ".join(f"{name} {rate / 1e12:,.1f}" for name, rate in machine["rates"].items())
        head = ["", "sets or cells/s", "x arc-state", "first, s", "full speed, s", "waiting", "timed"]
        head += ["TFLOP/s", "of product", "memory, GiB"]
        table = [head, ["---"] * len(head), *(self.cells(row, machine) for row in rows)]
        lines = [
            "# Training and generation on a GPU",
            "",
            f"{datetime.now(UTC).date()}, commit {_commit()}; {machine['device']}, {_cores()} cores; Python "
            f"{sys.version.split()[0]}, torch {machine['torch']}",
            f"`python -m benchmarks.gpu`: `{self.setting.preset}`; trainings in bf16 unless another is named, without "
            f"validation and checkpoints, timed for {self.setting.stretch:g} s, from {self.setting.warm:g} s after the "
            "first step and from step 150 on.",
            f"One product of {machine['size']:,} x {machine['size']:,}, TFLOP/s: {rates}.",
            "",
            *(f"| {' | '.join([*line, *[''] * (len(head) - len(line))])} |" for line in table),
            "",
            "first: seconds from the start of the command to its first step or its first target's cells, on a prepared "
            "store (bar: 5 for a training). full speed: seconds until nine tenths of the rate. waiting: for the reader "
            "(bar: below 2 %; -: the loop has no reader to wait for). timed: steps, or cells. memory: what torch "
            "reserved on the device.",
        ]
        notes: dict[str, list[str]] = {}
        for row in rows:
            answer = self.answers.get(row)
            for note in answer.get("notes", ()) if isinstance(answer, dict) else ():
                if any(word in note for word in ("graph", "cells:", "compil")):
                    notes.setdefault(note, []).append(self.name(row))
        said = [f"- {note} ({'; '.join(names)})" for note, names in notes.items()]
        return "\n".join([*lines, "", *said, *(f"- {text}" for text in left_out)]).rstrip() + "\n"


def _commit() -> str:
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure row after row; write the table after each."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of cells, made if need be, and of runs; default: a new one")
    parser.add_argument("--prepare-only", action="store_true", help="make the cells in --data, and nothing else")
    parser.add_argument("--small", action="store_true", help="a small network and few genes, on any machine")
    parser.add_argument("--minutes", type=float, default=8, help="skip the rows left after this (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", help="only these, by number, from 1 on")
    parser.add_argument("--set", action="append", default=[], help="a setting of every training, as for pertcast train")
    parser.add_argument("--peer", type=Path, help="folder with arc-state's packages `state` and `geomloss`")
    parser.add_argument("--peer-script", type=Path, help="what times arc-state's step and prints JSON")
    parser.add_argument("--result", type=Path, help=f"the table; default on a GPU: {RESULT.relative_to(ROOT)}")
    asked = parser.parse_args(arguments)
    setting = SMALL if asked.small else GPU
    folder = (asked.data or Path(tempfile.mkdtemp(prefix="pertcast-gpu-"))).resolve()
    write_data(folder, setting)
    print(f"cells: {time.monotonic() - begun:.1f} s", flush=True)
    if asked.prepare_only:
        return
    from pertcast.config import TrainConfig

    fields = TrainConfig.model_fields
    bench = Bench(setting, folder, begun + 60 * asked.minutes, asked.set)
    bench.peer, bench.peer_script = (path and path.resolve() for path in (asked.peer, asked.peer_script))
    machine = bench.child(["-m", "benchmarks.gpu_child", "product", str(setting.product), *_PRECISIONS])
    result = asked.result or (RESULT if machine["gpu"] and not asked.small else None)
    all_rows = rows_of(setting)
    rows = [all_rows[number - 1] for number in asked.rows] if asked.rows else all_rows
    left_out = [] if "cells" in fields else ["This version has no `train.cells`: no rows with cells on the host."]
    left_out += [f"Every training had {', '.join(asked.set)}."] if asked.set else []
    for number, row in enumerate(rows, start=1):
        bench.answers[row] = bench.measure(row, f"row{number}")
        print(f"{time.monotonic() - begun:5.0f} s | {' | '.join(bench.cells(row, machine))}", flush=True)
        page = bench.table(rows, machine, left_out=left_out)
        if result:
            result.parent.mkdir(parents=True, exist_ok=True)
            result.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
