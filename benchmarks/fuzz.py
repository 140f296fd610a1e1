"""Fuzzes what reads files of others, guided by coverage: archives, and the structure of h5ad files.

Whatever bytes come, nothing but a PertcastError may come out, no file may appear outside the output folder, and no
input may take longer than ten seconds. Needs atheris, which is no dependency of the project.

    python benchmarks/fuzz.py archive --seconds 300 --corpus corpus/archive
    python benchmarks/fuzz.py h5ad --seconds 300 --corpus corpus/h5ad
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

SEEDS = Path(__file__).resolve().parents[1] / "tests" / "corpus"
_MAX_BYTES = 40_000

__all__ = ["TARGETS"]


def _try_archive(content: bytes) -> None:
    """Unpack an archive of these bytes; nothing but the h5ad may be written."""
    from pertcast.errors import PertcastError
    from pertcast.submission.pack import unpack

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.vcc").write_bytes(content)
        (folder / "out").mkdir()
        with contextlib.suppress(PertcastError):
            unpack(folder / "a.vcc", folder / "out" / "b.h5ad")
        left = {str(path.relative_to(folder)) for path in folder.rglob("*")} - {"a.vcc", "out", "out/b.h5ad"}
        if left:
            raise AssertionError(f"files that should not be there: {left}")


def _try_h5ad(content: bytes) -> None:
    """Open an h5ad file of these bytes and read all that a check reads."""
    from pertcast.errors import PertcastError
    from pertcast.files.h5ad import open_h5ad

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.h5ad"
        path.write_bytes(content)
        with contextlib.suppress(PertcastError), open_h5ad(path) as reader:
            for column in reader.obs_columns:
                reader.obs(column)
            reader.obs_names()
            # as large as a file of these bytes may truly be
            if reader.num_stored <= 1_000_000:
                for _, block in reader.chunks(max_values=1000):
                    block.sum()


TARGETS: dict[str, Callable[[bytes], None]] = {"archive": _try_archive, "h5ad": _try_h5ad}


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, required=True, help="new inputs that reach new code come here")
    given = parser.parse_args()
    atheris = importlib.import_module("atheris")

    given.corpus.mkdir(parents=True, exist_ok=True)
    for path in (SEEDS / given.target).iterdir():
        shutil.copy(path, given.corpus)
    with atheris.instrument_imports(include=["pertcast", "tarfile"]):
        import pertcast.submission.pack  # noqa: F401
    options = [f"-max_total_time={given.seconds}", f"-max_len={_MAX_BYTES}", f"-seed={given.seed}", "-timeout=10"]
    artifacts = f"-artifact_prefix={given.corpus}/crash-"
    arguments = [sys.argv[0], *options, "-rss_limit_mb=4096", "-print_final_stats=1", artifacts, str(given.corpus)]
    atheris.Setup(arguments, TARGETS[given.target])
    atheris.Fuzz()


if __name__ == "__main__":
    _main()
