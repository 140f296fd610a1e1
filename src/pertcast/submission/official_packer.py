"""Pack the prediction with the official packer, too, and compare both archives value by value.

Invariants: the official tool only runs as a program. Our memory does not grow with the prediction. Nothing is left
behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import sparse

from pertcast.errors import SubmissionError
from pertcast.files.h5ad import H5adReader, open_h5ad
from pertcast.progress import SILENT, Progress
from pertcast.seasons import Season
from pertcast.submission.archive import extract_archive

# log1p of the same counts may differ in its last bit between two libraries
_RELATIVE_ROUNDING = 3e-7
_EXTRAS = {"cell-eval": "score", "vcc": "official"}


class CrossCheck(NamedTuple):
    """The result of the comparison."""

    packer: str  # The official packer, as it is called
    num_cells: int  # The shape that both packed
    num_genes: int
    largest_difference: float  # Of two values, relative to the larger; 0 if all are equal


def find_packer(season: Season) -> Path:
    """Return the program of the season's official packer."""
    name = season.packer.split()[0]
    variable = "PERTCAST_" + name.upper().replace("-", "_")
    named = os.environ.get(variable)
    found = named or shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if not found or not Path(found).is_file():
        extra = _EXTRAS[name]
        raise SubmissionError(
            f"cross-check: the official packer `{season.packer}` is not installed here; install it with "
            f"pip install 'pertcast[{extra}]', or name the program in {variable}"
        )
    return Path(found)


def cross_check(
    prediction: Path,
    archive: Path,
    *,
    season: Season,
    genes: Path,
    targets: Path | None = None,
    progress: Progress = SILENT,
) -> CrossCheck:
    """Pack a prediction with the official packer, too, and compare it with our archive."""
    program = find_packer(season)
    with tempfile.TemporaryDirectory(prefix=".cross-check-", dir=archive.parent) as folder:
        official = Path(folder) / "official.vcc"
        command = [str(program), *_arguments(prediction, official, season, genes, targets)]
        progress.note(f"cross-check: {' '.join(command)}")
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode or not official.is_file():
            said = (ran.stderr or ran.stdout).strip().splitlines()
            raise SubmissionError(
                f"{prediction}: `{season.packer}` refuses it: {said[-1] if said else 'no reason given'}; "
                f"{archive} is kept, but please report this: what we pack, it should pack"
            )
        for name, packed in (("ours", archive), ("theirs", official)):
            extract_archive(packed, Path(folder) / f"{name}.h5ad", progress=progress)
        official.unlink()
        with open_h5ad(Path(folder) / "ours.h5ad") as ours, open_h5ad(Path(folder) / "theirs.h5ad") as theirs:
            return _compare(ours, theirs, season, archive)


def _arguments(prediction: Path, out: Path, season: Season, genes: Path, targets: Path | None) -> list[str]:
    files = ["prep", "-i", str(prediction), "-g", str(genes), "-o", str(out)]
    files += ["--expected-gene-dim", str(season.num_genes), "--max-cell-dim", str(season.max_cells)]
    if season.context_column is None:
        return files
    with open_h5ad(prediction) as reader:
        contexts = sorted(map(str, reader.obs(season.context_column).categories))
    limits = {
        "--contexts": ",".join(contexts),
        "--cells-per-pert": season.cells_per_target,
        "--max-nnz": season.max_stored_values,
        "--max-counts-per-cell": season.max_cell_sum,
    }
    perts = ["--perts", str(targets)] if targets is not None else ["--no-verify-targets"]
    return [*files, *perts, *(str(item) for pair in limits.items() for item in pair)]


def _compare(ours: H5adReader, theirs: H5adReader, season: Season, archive: Path) -> CrossCheck:
    def refuse(what: str) -> SubmissionError:
        return SubmissionError(f"{archive}: cross-check: {what}; do not submit it, and please report this")

    shapes = [(reader.num_cells, reader.num_genes) for reader in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise refuse(f"`{season.packer}` packs {shapes[1]} cells and genes, we pack {shapes[0]}")
    if ours.genes != theirs.genes:
        raise refuse(f"`{season.packer}` packs other genes, or in another order")
    for column in filter(None, (season.pert_column, season.context_column)):
        labels = [np.asarray(reader.obs(column), dtype=object) for reader in (ours, theirs)]
        differ = np.flatnonzero(labels[0] != labels[1])
        if len(differ):
            raise refuse(
                f"{column} of cell {differ[0]} is {labels[0][differ[0]]!r} here, {labels[1][differ[0]]!r} there"
            )
    largest = 0.0
    for first, own, other in _side_by_side(ours, theirs):
        gap = abs(own - other)
        if gap.nnz:
            # both are sparse: compare where they differ alone
            bound = own.maximum(other).tocsr()
            rows, columns = gap.nonzero()
            values = np.asarray(gap[rows, columns]).ravel(), np.asarray(bound[rows, columns]).ravel()
            relative = values[0] / np.maximum(values[1], np.finfo(np.float32).tiny)
            worst = int(relative.argmax())
            largest = max(largest, float(relative[worst]))
            if largest > _RELATIVE_ROUNDING:
                gene = ours.genes[columns[worst]]
                raise refuse(f"cell {first + rows[worst]}, gene {gene}: the two values differ by {values[0][worst]:g}")
    return CrossCheck(season.packer, *shapes[0], largest)


def _side_by_side(ours: H5adReader, theirs: H5adReader) -> Iterator[tuple[int, sparse.csr_matrix, sparse.csr_matrix]]:
    """Yield the same rows of both, whatever their blocks, which stored zeros may change."""
    streams = [(block for _, block in reader.chunks(max_values=1 << 22)) for reader in (ours, theirs)]
    held: list[sparse.csr_matrix | None] = [None, None]
    first = 0
    while first < ours.num_cells:
        blocks = [block if block is not None else next(stream) for block, stream in zip(held, streams, strict=True)]
        size = min(block.shape[0] for block in blocks)
        yield first, blocks[0][:size], blocks[1][:size]
        held = [block[size:] if block.shape[0] > size else None for block in blocks]
        first += size
