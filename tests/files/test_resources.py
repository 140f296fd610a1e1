"""A full disk, two runs at once, leftovers of dead runs: one clear error, and what was there stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from conftest import SMALL_GENES, write_small_h5ad
from pertcast.errors import DataError, PertcastError, SubmissionError
from pertcast.files.artefacts import atomic_file, claimed, locked
from pertcast.files.h5ad_writer import CsrWriter
from pertcast.files.resources import available_cpus, describe_write_error, require_space
from pertcast.seasons import season as season_of
from pertcast.submission.pack import pack, unpack

RULES = {"num_genes": len(SMALL_GENES)}


def write_genes(path: Path) -> Path:
    path.write_text("".join(f"{name}\n" for name in SMALL_GENES))
    return path


def write_large(path: Path, *, cells: int = 30_000) -> Path:
    rng = np.random.default_rng(0)
    with CsrWriter(path, SMALL_GENES) as writer:
        writer.append(sparse.csr_matrix(rng.random((cells, len(SMALL_GENES)), dtype=np.float32)))
        labels = pd.Categorical(np.where(np.arange(cells) % 2, "G1", "non-targeting"))
        writer.finish(pd.DataFrame({"target_gene": labels}, index=pd.RangeIndex(cells).astype(str)))
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("estimated", [True, False])
@pytest.mark.parametrize("form", ["slim", "wide"])
def test_packing_onto_a_full_disk_leaves_what_was_there(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, estimated: bool, form: str
) -> None:
    genes, before = write_genes(tmp_path / "genes.csv"), write_small_h5ad(tmp_path / "before.h5ad", scale="log1p")
    out = pack(before, small_disk / "p.vcc", season=season_of("vcc2025", RULES), genes=genes)
    path = write_large(tmp_path / "large.h5ad")
    if form == "wide":
        import anndata as ad

        cells = ad.read_h5ad(path)
        cells.obs["more"] = 1.0
        cells.write_h5ad(path)
    if not estimated:
        monkeypatch.setattr("pertcast.submission.pack.require_space", lambda *args, **options: None)
    there = listing(small_disk)
    with pytest.raises(PertcastError, match=r"needs about .* free" if estimated else "the disk is full") as caught:
        pack(path, out, season=season_of("vcc2025", RULES), genes=genes)
    assert str(caught.value).count("\n") == 0
    assert listing(small_disk) == there


def test_unpacking_onto_a_full_disk_leaves_what_was_there(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genes = write_genes(tmp_path / "genes.csv")
    path = write_large(tmp_path / "large.h5ad")
    vcc = pack(path, tmp_path / "p.vcc", season=season_of("vcc2025", RULES), genes=genes)
    (small_disk / "p.h5ad").write_bytes(b"before")
    with pytest.raises(DataError, match="needs about"):
        unpack(vcc, small_disk / "p.h5ad", force=True)
    monkeypatch.setattr("pertcast.submission.archive.require_space", lambda *args, **options: None)
    with pytest.raises(SubmissionError, match="the disk is full"):
        unpack(vcc, small_disk / "p.h5ad", force=True)
    assert listing(small_disk) == {"p.h5ad": b"before"}


@pytest.mark.parametrize("room", range(0, 1_200_000, 100_000))
def test_a_disk_that_fills_up_anywhere_in_a_file_is_an_os_error(small_disk: Path, room: int) -> None:
    (small_disk / "other").write_bytes(bytes(2_000_000 - room))
    before = listing(small_disk)
    with pytest.raises(OSError) as caught, atomic_file(small_disk / "p.h5ad") as temporary:  # noqa: PT011
        write_large(temporary)
    assert "the disk is full" in describe_write_error(small_disk / "p.h5ad", caught.value) or room > 500_000
    assert listing(small_disk) == before


def test_room_is_asked_for_where_the_folder_is_not_there_yet(tmp_path: Path) -> None:
    require_space(tmp_path / "a" / "b" / "c.vcc", 1000, what="the archive")
    with pytest.raises(DataError, match=r"the archive needs about 1000000\.0 GB, and its disk has .* free; make room"):
        require_space(tmp_path / "a" / "c.vcc", 10**15, what="the archive")


def test_an_error_without_a_number_is_told_by_its_text_or_by_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "disk is full" in describe_write_error(tmp_path / "a", OSError("write failed, No space left on device"))
    assert "(odd)" in describe_write_error(tmp_path / "a", OSError("odd\nmore"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    assert "disk is full" in describe_write_error(tmp_path / "a", OSError("odd"))


HOLD = """
import pathlib, sys
from pertcast.files.artefacts import locked
with locked(pathlib.Path(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_the_second_of_two_runs_says_so_and_stops(tmp_path: Path) -> None:
    genes, path = write_genes(tmp_path / "genes.csv"), write_small_h5ad(tmp_path / "p.h5ad", scale="log1p")
    command = [sys.executable, "-c", HOLD, str(tmp_path / "p.vcc")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(DataError, match=rf"p\.vcc: another run \(process {other.pid}\) is writing it; wait"):
            pack(path, tmp_path / "p.vcc", season=season_of("vcc2025", RULES), genes=genes)
        assert not (tmp_path / "p.vcc").exists()
        other.communicate(timeout=60)
    pack(path, tmp_path / "p.vcc", season=season_of("vcc2025", RULES), genes=genes)
    assert not list(tmp_path.glob(".*"))


def test_a_lock_of_a_dead_run_is_taken_over(tmp_path: Path) -> None:
    script = "import os, sys, pathlib; from pertcast.files.artefacts import locked\n"
    script += "with locked(pathlib.Path(sys.argv[1])): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")]).returncode == 9
    assert [path.name for path in tmp_path.iterdir()] == [".a.lock"]
    with locked(tmp_path / "a"):
        pass
    assert not list(tmp_path.iterdir())


def test_leftovers_beside_and_inside_an_output_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "parts"
    (out / "H1").mkdir(parents=True)
    kept = [out / "plan.json", out / "H1" / "G1.h5ad", tmp_path / ".other.partial-1"]
    dead = [out / ".plan.json.partial-1", out / "H1" / ".G1.h5ad.partial-2", tmp_path / ".parts.partial-3"]
    for path in (*kept, *dead):
        path.write_text("")
    with claimed(out):
        assert not any(path.exists() for path in dead)
    assert all(path.exists() for path in kept)


def test_processors_are_those_that_the_process_may_use() -> None:
    command = [sys.executable, "-c", "from pertcast.files.resources import available_cpus; print(available_cpus())"]
    pinned = ["taskset", "-c", "0", *command] if shutil.which("taskset") else command
    number = int(subprocess.run(pinned, check=True, capture_output=True, text=True).stdout)
    assert number == (1 if shutil.which("taskset") else available_cpus())
