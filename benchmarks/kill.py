"""Kills generate, assemble and pack at random moments (SIGKILL); the rerun must end as if nothing had happened.

The final file must be that of an uninterrupted run to the bit, and nothing but outputs may be left in its folder. The
moments are drawn with a seed, between the start of a stage and the time that it takes.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pertcast.files.artefacts import hash_file
from pertcast.stats.draws import generator

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from workspace import Workspace, make_workspace

__all__ = ["Stage", "kill_at_random", "make_stages"]

_TARGETS = "target_gene,n_cells\nG1,9000\nG2,9000\nG3,9000\n"
_RULES = ("num_genes=20", "num_targets=3", "max_cells=40000")


@dataclass(frozen=True)
class Stage:
    """One command, the outputs that it may leave, and the one that must be equal to the bit.

    Attributes
    ----------
    name
        Of the command.
    arguments
        Of ``pertcast``, with ``OUT`` for the folder of outputs.
    result
        The output, relative to that folder.
    """

    name: str
    arguments: tuple[str, ...]
    result: str

    def command(self, out: Path) -> list[str]:
        """Return the whole command line for a folder of outputs."""
        return [sys.executable, "-m", "pertcast", *(part.replace("OUT", str(out)) for part in self.arguments)]


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def make_stages(folder: Path) -> list[Stage]:
    """Train a small run in a folder; return the three stages on top of it, each with what comes before it done."""
    workspace: Workspace = make_workspace(folder)
    workspace.targets.write_text(_TARGETS)
    text = workspace.experiment.read_text().replace("max_cells = 120", "max_cells = 40000")
    workspace.experiment.write_text(text)
    calm = folder / "calm"
    pertcast = [sys.executable, "-m", "pertcast"]
    _run([*pertcast, "run", str(workspace.experiment), "--out", str(calm)])
    rules = [part for rule in _RULES for part in ("--set", rule)]
    lists = ("--genes", str(workspace.genes), "--targets", str(workspace.targets), *rules)
    return [
        Stage("generate", ("generate", f"{calm}/run", "--out", "OUT/parts"), "parts"),
        Stage("assemble", ("assemble", f"{calm}/parts", "--out", "OUT/prediction.h5ad"), "prediction.h5ad"),
        Stage("pack", ("pack", f"{calm}/prediction.h5ad", *lists, "-o", "OUT/prediction.vcc"), "prediction.vcc"),
    ]


def _hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every file under a folder."""
    return {str(path.relative_to(folder)): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def kill_at_random(stages: Sequence[Stage], folder: Path, *, kills: int, seed: int) -> Mapping[str, int]:
    """Kill stages in turn at random moments, run each again, and compare.

    Returns
    -------
    How many kills struck each stage; one that came after its end is drawn again.

    Raises
    ------
    AssertionError
        If a rerun leaves other files, or other bytes, than a run that was never killed.
    """
    expected, seconds = {}, {}
    for stage in stages:
        out = folder / f"whole-{stage.name}"
        out.mkdir(parents=True)
        start = time.monotonic()
        _run(stage.command(out))
        expected[stage.name], seconds[stage.name] = _hashes(out), time.monotonic() - start
    struck = dict.fromkeys(expected, 0)
    random = generator(seed, "kills")
    number = 0
    while sum(struck.values()) < kills:
        stage = stages[sum(struck.values()) % len(stages)]
        number += 1
        out = folder / f"killed-{number}"
        out.mkdir()
        # most of a stage's time is Python's start, so that moments are drawn from its later part
        moment = seconds[stage.name] * (0.4 + 0.6 * random.random())
        process = subprocess.Popen(stage.command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            # it had ended: the machine is faster now than it was when the stage was timed
            seconds[stage.name] *= 0.9
            continue
        struck[stage.name] += 1
        left = sorted(path.name for path in out.rglob("*") if path.is_file())
        _run(stage.command(out))
        if _hashes(out) != expected[stage.name]:
            raise AssertionError(f"{stage.name}, killed after {moment:.3f} s: {_hashes(out)} != {expected[stage.name]}")
        print(f"{stage.name:<9} killed after {moment:6.3f} s; left {len(left)} file(s)", flush=True)
        shutil.rmtree(out)
    return struck


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stages = make_stages(Path(folder) / "w")
        struck = kill_at_random(stages, Path(folder) / "kills", kills=given.kills, seed=given.seed)
    shown = ", ".join(f"{number} in {name}" for name, number in struck.items())
    print(
        f"{given.kills} kills ({shown} before it had ended): every rerun ended equal to the bit, nothing else was left"
    )


if __name__ == "__main__":
    _main()
