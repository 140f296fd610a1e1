from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pertcast.errors import ConfigError, DataError, PertcastError
from pertcast.processes import Ranks, launched, run_processes
from pertcast.progress import SILENT


class Keeper:
    """A progress that keeps all that it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Any]:
        self.told.append((label, total, unit, done))
        yield lambda amount, detail="": self.told.append((amount, detail))
        self.told.append("end")

    def note(self, text: str) -> None:
        self.told.append(text)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.told.append((title, header, rows))


@pytest.fixture(autouse=True)
def _work_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import pertcast

    source = Path(pertcast.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{source}:{Path(__file__).parents[1]}")


def test_each_process_knows_who_it_is_and_the_first_one_is_heard(tmp_path: Path) -> None:
    keeper = Keeper()
    run_processes("processes_work:share", {"out": str(tmp_path)}, num=3, progress=keeper)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        str(rank): f"{rank} 3 {rank} 3 127.0.0.1" for rank in range(3)
    }
    assert keeper.told == ["begun", ("all", 4, "cells", 1), (3, "three"), "end", ("facts", ["a"], [["1"]])]


@pytest.mark.parametrize(
    ("how", "kind", "expected"),
    [
        ("error", DataError, r"^cells\.h5ad: broken$"),
        ("disk", OSError, "No space left"),
        ("bug", PertcastError, "process 2 of 2 ended with code 1"),
        ("kill", PertcastError, "process 2 of 2 was killed, usually because memory ran out"),
    ],
)
def test_one_process_that_fails_ends_all_with_its_error(
    capfd: pytest.CaptureFixture[str], how: str, kind: type[Exception], expected: str
) -> None:
    with pytest.raises(kind, match=expected):
        run_processes("processes_work:fail", {"how": how}, num=2, progress=SILENT)
    assert ("ZeroDivisionError" in capfd.readouterr().err) == (how == "bug")


def test_an_interrupt_is_handed_on_once_and_waited_for(tmp_path: Path) -> None:
    class Impatient(Keeper):
        def note(self, text: str) -> None:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_processes("processes_work:wait", {"out": str(tmp_path)}, num=1, progress=Impatient())
    assert (tmp_path / "0").read_text() == "finished"
    assert signal.getsignal(signal.SIGINT) is before


def test_launchers_say_which_process_this_is() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert launched(torchrun) == Ranks(5, 8, 1, 4, 2, "torchrun")
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_NNODES": "2"}
    assert launched(batch_script) is None
    assert launched({**batch_script, "SLURM_STEP_ID": "0", "SLURM_PROCID": "6", "SLURM_LOCALID": "2"}) == Ranks(
        6, 8, 2, 4, 2, "srun"
    )
    assert launched({**torchrun, "WORLD_SIZE": "1"}) is None
    assert str(launched(torchrun)) == "process 6 of 8"
    with pytest.raises(ConfigError, match="--ntasks-per-node"):
        launched({**batch_script, "SLURM_STEP_ID": "0", "SLURM_NTASKS": "7"})
    with pytest.raises(ConfigError, match="RANK='x'"):
        launched({**torchrun, "RANK": "x"})
