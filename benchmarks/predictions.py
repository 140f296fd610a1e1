"""Writes simulated predictions of the size that people submit: season 2025 log1p or season 2026 counts.

Counts are negative binomial around log-normal gene means: 54,000 UMI and about 7,000 stored values a cell
(season 2025), 20,000 UMI and about 5,000 (season 2026). The same call writes the same values, in bounded memory.

    python benchmarks/predictions.py --season vcc2026 --cells-per-target 100 --out bench
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse, stats

from pertcast.files.h5ad import open_h5ad
from pertcast.files.h5ad_writer import CsrWriter
from pertcast.files.scales import normalise_log1p
from pertcast.seasons import CONTROL_LABEL, PERT_COLUMN, Season, season
from pertcast.stats.draws import generator

__all__ = ["Lists", "find_shared", "rewrite", "write_lists", "write_prediction"]

Form = Literal["dense", "int32", "shuffled"]
_NUM_CONTROLS = 5_000
_BLOCK_CELLS = 512
_DISPERSION = 0.12
_UMIS = {"vcc2025": 54_000, "vcc2026": 20_000}
_GENE_SPREAD = {"vcc2025": 2.1, "vcc2026": 1.8}


@dataclass(frozen=True)
class Lists:
    """The season's lists as files, and the labels of all cells."""

    season: Season
    genes: Path
    targets: Path
    obs: pd.DataFrame


def find_shared() -> Path:
    """Return the folder of real data."""
    return Path(os.environ.get("PERTCAST_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"


def write_lists(folder: Path, name: str, *, cells_per_target: int | None = None) -> Lists:
    """Write a season's gene and target lists; `cells_per_target` makes a smaller prediction with the same targets."""
    rules, shared = season(name), find_shared()
    folder.mkdir(parents=True, exist_ok=True)
    genes = (shared / "vcc2025" / "gene_names.csv").read_text().split()
    genes += [f"FILLER{number}" for number in range(rules.num_genes - len(genes))]
    header = [rules.genes_header] if rules.genes_header else []
    (folder / "genes.csv").write_text("".join(f"{gene}\n" for gene in [*header, *genes]))
    source = shared / name / ("pert_counts_Validation.csv" if name == "vcc2025" else "pert_counts.csv")
    with source.open(newline="") as stream:
        listed = [
            (row[PERT_COLUMN], int(row.get("n_cells") or rules.cells_per_target or 0)) for row in csv.DictReader(stream)
        ]
    cells = [(target, cells_per_target or number) for target, number in listed]
    rows = "".join(f"{target},{number}\n" for target, number in cells)
    (folder / "targets.csv").write_text(f"{PERT_COLUMN},n_cells\n{rows}")
    if rules.controls == "required":
        cells.append((CONTROL_LABEL, _NUM_CONTROLS if cells_per_target is None else cells_per_target))
    names, numbers = [target for target, _ in cells], [number for _, number in cells]
    contexts = rules.contexts[0] if rules.contexts else ("",)
    columns = {PERT_COLUMN: pd.Categorical(np.tile(np.repeat(names, numbers), len(contexts)))}
    if rules.context_column:
        columns[rules.context_column] = pd.Categorical(np.repeat(contexts, sum(numbers)))
    index = pd.RangeIndex(sum(numbers) * len(contexts)).astype(str)
    return Lists(rules, folder / "genes.csv", folder / "targets.csv", pd.DataFrame(columns, index=index))


def _blocks(num_cells: int, num_genes: int, name: str, seed: int) -> Iterator[sparse.csr_matrix]:
    quantiles = stats.norm.ppf((np.arange(num_genes) + 0.5) / num_genes)
    means = np.exp(_GENE_SPREAD[name] * generator(seed, "gene means").permutation(quantiles))
    shares: NDArray[np.float64] = means / means.sum()
    for first in range(0, num_cells, _BLOCK_CELLS):
        random = generator(seed, "cells", first)
        rows = min(_BLOCK_CELLS, num_cells - first)
        sizes = np.exp(0.3 * random.normal(size=(rows, 1)))
        scale = (shares * _UMIS[name] * _DISPERSION).astype(np.float32)
        rates = random.standard_gamma(np.float32(1 / _DISPERSION), size=(rows, num_genes), dtype=np.float32) * scale
        counts = sparse.csr_matrix(random.poisson(rates * sizes).astype(np.float32))
        if name == "vcc2025":
            counts = normalise_log1p(counts, np.asarray(counts.sum(1)).ravel(), float(_UMIS[name]))
        yield counts


def write_prediction(path: Path, lists: Lists, *, seed: int = 0) -> Path:
    """Write a valid prediction as ``pertcast assemble`` does."""
    genes = lists.genes.read_text().split()[1 if lists.season.genes_header else 0 :]
    with CsrWriter(path, genes) as writer:
        for block in _blocks(len(lists.obs), len(genes), lists.season.name, seed):
            writer.append(block)
        writer.finish(lists.obs)
    return path


def rewrite(path: Path, out: Path, form: Form) -> Path:
    """Write the same prediction in another form: dense, as int32 counts, or with its genes shuffled."""
    with open_h5ad(path) as reader, h5py.File(path, "r") as source, h5py.File(out, "w") as file:
        for name in ("obs", "var"):
            source.copy(name, file)
        file.attrs.update(source.attrs)
        order = generator(0, "shuffle").permutation(reader.num_genes)
        if form == "dense":
            _write_dense(file, reader.chunks(max_values=1 << 22), (reader.num_cells, reader.num_genes))
            return out
        if form == "shuffled":
            names = np.array(reader.genes, dtype=object)[order]
            del file["var"]["_index"]
            node = file["var"].create_dataset("_index", data=names, dtype=h5py.string_dtype())
            node.attrs.update(source["var"]["_index"].attrs)
        group = file.create_group("X")
        group.attrs.update(source["X"].attrs)
        source.copy("X/indptr", group)
        kinds = {"data": np.dtype(np.int32 if form == "int32" else np.float32), "indices": np.dtype(np.int32)}
        columns = {name: group.create_dataset(name, (reader.num_stored,), dtype=kind) for name, kind in kinds.items()}
        done = 0
        for _, block in reader.chunks(max_values=1 << 22):
            moved = block[:, order] if form == "shuffled" else block
            moved.sort_indices()
            part = slice(done, done + moved.nnz)
            columns["data"][part], columns["indices"][part] = moved.data.astype(kinds["data"]), moved.indices
            done = part.stop
    return out


def _write_dense(file: Any, blocks: Iterator[tuple[int, sparse.csr_matrix]], shape: tuple[int, int]) -> None:
    node = file.create_dataset("X", shape, dtype=np.float32)
    node.attrs["encoding-type"], node.attrs["encoding-version"] = "array", "0.2.0"
    for first, block in blocks:
        node[first : first + block.shape[0]] = block.toarray()


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--season", required=True)
    parser.add_argument("--out", type=Path, required=True, help="a folder: genes.csv, targets.csv, prediction.h5ad")
    parser.add_argument("--cells-per-target", type=int)
    parser.add_argument("--form", choices=get_args(Form), help="rewrite the prediction that is there as FORM.h5ad")
    given = parser.parse_args(arguments)
    prediction = given.out / "prediction.h5ad"
    if given.form:
        rewrite(prediction, given.out / f"{given.form}.h5ad", given.form)
        return
    lists = write_lists(given.out, given.season, cells_per_target=given.cells_per_target)
    write_prediction(prediction, lists)
    print(len(lists.obs))


if __name__ == "__main__":
    _main()
