"""Kills generate, assemble and pack at random moments (SIGKILL); the rerun must end as if nothing had happened.

The final file must be that of an uninterrupted run to the bit, and nothing but outputs may be left in its folder. The
moments are drawn with a seed, between the first byte in the folder of outputs and the end of the stage.

    python benchmarks/kill.py --kills 30 --seed 0
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pertcast.files.artefacts import hash_file
from pertcast.stats.draws import generator

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from conftest import write_small_h5ad
from workspace import Workspace, make_workspace

__all__ = ["Kill", "Stage", "kill_at_random", "make_stages"]

_POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Stage:
    """One command, and the outputs that it may leave.

    Attributes
    ----------
    name
        Of the command.
    arguments
        Of ``pertcast``, with ``OUT`` for the folder of outputs.
    """

    name: str
    arguments: tuple[str, ...]

    def command(self, out: Path) -> list[str]:
        """Return the whole command line for a folder of outputs."""
        return [sys.executable, "-m", "pertcast", *(part.replace("OUT", str(out)) for part in self.arguments)]


@dataclass(frozen=True)
class Kill:
    """One kill: when it came after the first byte, of how many seconds from there to the end, and what it left."""

    stage: str
    seconds: float
    window: float
    num_files: int
    num_bytes: int


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def make_stages(folder: Path, *, num_genes: int, cells_per_target: int) -> list[Stage]:
    """Train a small run in a folder; return the three stages on top of it, each with what comes before it done."""
    workspace: Workspace = make_workspace(folder)
    genes = [f"G{number}" for number in range(num_genes)]
    max_cells = 4 * cells_per_target
    write_small_h5ad(workspace.data, genes=genes)
    workspace.genes.write_text("".join(f"{gene}\n" for gene in genes))
    workspace.targets.write_text("".join(["target_gene,n_cells\n", *(f"G{n},{cells_per_target}\n" for n in (1, 2, 3))]))
    text = workspace.experiment.read_text().replace("max_cells = 120", f"max_cells = {max_cells}")
    workspace.experiment.write_text(text.replace("num_genes = 20", f"num_genes = {num_genes}"))
    calm = folder / "calm"
    _run([sys.executable, "-m", "pertcast", "run", str(workspace.experiment), "--out", str(calm)])
    rules = [
        part
        for rule in (f"num_genes={num_genes}", "num_targets=3", f"max_cells={max_cells}")
        for part in ("--rule", rule)
    ]
    lists = ("--genes", str(workspace.genes), "--targets", str(workspace.targets), *rules)
    return [
        Stage("generate", ("generate", f"{calm}/run", "--out", "OUT/parts")),
        Stage("assemble", ("assemble", f"{calm}/parts", "--out", "OUT/prediction.h5ad")),
        Stage("pack", ("pack", f"{calm}/prediction.h5ad", *lists, "-o", "OUT/prediction.vcc")),
    ]


def _hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every file under a folder."""
    return {str(path.relative_to(folder)): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _sizes(folder: Path) -> list[int]:
    """Return the bytes of every file under a folder but the locks; a file may vanish meanwhile."""
    sizes = []
    for path in folder.rglob("*"):
        try:
            if path.is_file() and path.suffix != ".lock":
                sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue
    return sizes


def _start(stage: Stage, out: Path) -> subprocess.Popen[bytes]:
    """Start a stage; return it when the first byte lies in the folder of outputs."""
    out.mkdir(parents=True)
    process = subprocess.Popen(stage.command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not sum(_sizes(out)):
        if process.poll() is not None:
            raise subprocess.CalledProcessError(process.returncode, stage.command(out))
        time.sleep(_POLL_SECONDS)
    return process


def kill_at_random(stages: Sequence[Stage], folder: Path, *, kills: int, seed: int) -> list[Kill]:
    """Kill stages in turn at random moments after their first byte, run each again, and compare.

    Returns
    -------
    What struck; a kill that came after the stage's end is drawn again.

    Raises
    ------
    AssertionError
        If a rerun leaves other files, or other bytes, than a run that was never killed.
    """
    expected, window = {}, {}
    for stage in stages:
        out = folder / f"whole-{stage.name}"
        process = _start(stage, out)
        start = time.monotonic()
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, stage.command(out))
        expected[stage.name], window[stage.name] = _hashes(out), time.monotonic() - start
        shutil.rmtree(out)
    struck: list[Kill] = []
    random = generator(seed, "kills")
    while len(struck) < kills:
        stage = stages[len(struck) % len(stages)]
        out = folder / "killed"
        seconds = window[stage.name] * random.random()
        process = _start(stage, out)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            # it had ended: the machine is faster now than it was when the stage was timed
            window[stage.name] *= 0.9
            shutil.rmtree(out)
            continue
        sizes = _sizes(out)
        _run(stage.command(out))
        if _hashes(out) != expected[stage.name]:
            raise AssertionError(
                f"{stage.name}, killed {seconds:.3f} s after its first byte: {_hashes(out)} != {expected[stage.name]}"
            )
        shutil.rmtree(out)
        struck.append(Kill(stage.name, seconds, window[stage.name], len(sizes), sum(sizes)))
        print(
            f"{stage.name:<9} killed {seconds:6.3f} s after its first byte, of {window[stage.name]:6.3f} s; "
            f"{len(sizes)} file(s), {sum(sizes) / 1e6:.3f} MB were there",
            flush=True,
        )
    return struck


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--cells-per-target", type=int, default=12_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stages = make_stages(Path(folder) / "w", num_genes=given.genes, cells_per_target=given.cells_per_target)
        struck = kill_at_random(stages, Path(folder) / "kills", kills=given.kills, seed=given.seed)
    shown = ", ".join(f"{number} in {name}" for name, number in Counter(kill.stage for kill in struck).items())
    late = sum(kill.num_bytes > 0 for kill in struck)
    print(
        f"{len(struck)} kills ({shown}), {late} of them after the first byte: "
        "every rerun ended equal to the bit, nothing else was left"
    )


if __name__ == "__main__":
    _main()
