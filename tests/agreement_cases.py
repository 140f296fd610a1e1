"""Small valid submissions of both seasons, and what is done to them, for ours and the official packer to judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

GENES = tuple(f"G{number}" for number in range(20))
TARGETS = ("G1", "G2", "G3")
CONTROL = "non-targeting"
LIMITS: Mapping[str, Mapping[str, int]] = {
    "vcc2025": {"num_genes": 20, "num_targets": 3, "max_cells": 60},
    "vcc2026": {
        "num_genes": 20,
        "num_targets": 3,
        "max_cells": 60,
        "cells_per_target": 4,
        "max_cell_sum": 200,
        "max_stored_values": 10_000,
    },
}


@dataclass
class Draft:
    """A submission before it is written: the cells, the two lists, the limits, and edits of the written file."""

    cells: ad.AnnData
    genes: list[str]
    targets: list[str]
    limits: dict[str, int]
    contexts: str = "A,B,C"
    listed: bool = True
    raw: list[Callable[[Any], None]] = field(default_factory=list)
    last: Callable[[Path], None] | None = None

    @property
    def dense(self) -> np.ndarray:
        return np.asarray(self.cells.X.toarray())

    @dense.setter
    def dense(self, values: np.ndarray) -> None:
        self.cells.X = sparse.csr_matrix(values)

    def write(self, folder: Path) -> None:
        """Write p.h5ad, genes.csv and targets.csv."""
        folder.mkdir(parents=True)
        self.cells.write_h5ad(folder / "p.h5ad")
        with h5py.File(folder / "p.h5ad", "r+") as file:
            for edit in self.raw:
                edit(file)
        if self.last is not None:
            self.last(folder / "p.h5ad")
        (folder / "genes.csv").write_text("".join(f"{gene}\n" for gene in self.genes))
        (folder / "targets.csv").write_text("".join(f"{line}\n" for line in self.targets))


Change = Callable[[Draft], object]


def draft_2026() -> Draft:
    """Return counts of 3 contexts x 3 targets x 4 cells; a cell's sum is below 200, and its first value is above 0."""
    rows = [(context, target) for context in "ABC" for target in TARGETS for _ in range(4)]
    counts = np.random.default_rng(26).poisson(2.0, (len(rows), 20)).astype(np.float32)
    counts[:, 0] += 1
    obs = pd.DataFrame(rows, columns=["context", "target_gene"], index=[f"c{i}" for i in range(len(rows))])
    cells = ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=list(GENES)))
    return Draft(cells, ["gene_name", *GENES], ["target_gene", *TARGETS], dict(LIMITS["vcc2026"]))


def draft_2025() -> Draft:
    """Return log1p of 12 cells of each of 3 targets and of controls."""
    labels = np.repeat([CONTROL, *TARGETS], 12)
    counts = np.random.default_rng(25).poisson(5.0, (48, 20)) + (np.arange(20) == 0)
    values = np.log1p(counts * (1e4 / counts.sum(1, keepdims=True))).astype(np.float32)
    obs = pd.DataFrame({"target_gene": labels}, index=[f"c{i}" for i in range(48)])
    cells = ad.AnnData(sparse.csr_matrix(values), obs=obs, var=pd.DataFrame(index=list(GENES)))
    targets = ["target_gene,n_cells", *(f"{target},12" for target in TARGETS)]
    return Draft(cells, list(GENES), targets, dict(LIMITS["vcc2025"]))


DRAFTS: Mapping[str, Callable[[], Draft]] = {"vcc2025": draft_2025, "vcc2026": draft_2026}


# what is done to a draft


def both(*changes: Change) -> Change:
    return lambda draft: [change(draft) for change in changes]


def layout(make: Callable[[Any], Any]) -> Change:
    def change(draft: Draft) -> None:
        draft.cells.X = make(draft.dense)

    return change


def cast(dtype: str) -> Change:
    def change(draft: Draft) -> None:
        draft.cells.X = draft.cells.X.astype(dtype)

    return change


def value(number: float, *, row: int = 7, gene: int = 0, dtype: str = "float32") -> Change:
    def change(draft: Draft) -> None:
        values = draft.dense.astype(dtype)
        values[row, gene] = number
        draft.dense = values

    return change


def rows(make: Callable[[Draft], Any]) -> Change:
    """Set all genes of some cells to 0."""

    def change(draft: Draft) -> None:
        values = draft.dense
        values[make(draft)] = 0
        draft.dense = values

    return change


def label(new: object, *, row: int = 5, column: str = "target_gene") -> Change:
    def change(draft: Draft) -> None:
        labels = draft.cells.obs[column].astype(object).to_numpy()
        labels[row] = new
        draft.cells.obs[column] = pd.Categorical(labels)

    return change


def rename(old: str, new: str, *, column: str = "target_gene") -> Change:
    def change(draft: Draft) -> None:
        draft.cells.obs[column] = draft.cells.obs[column].astype(str).replace(old, new)

    return change


def is_in(context: str, target: str) -> Callable[[Draft], np.ndarray]:
    return lambda draft: np.asarray(
        (draft.cells.obs["context"] == context) & (draft.cells.obs["target_gene"] == target)
    )


def is_target(target: str) -> Callable[[Draft], np.ndarray]:
    return lambda draft: np.asarray(draft.cells.obs["target_gene"] == target)


def drop(make: Callable[[Draft], np.ndarray]) -> Change:
    def change(draft: Draft) -> None:
        draft.cells = draft.cells[~make(draft)].copy()

    return change


def take(order: Callable[[int], Any]) -> Change:
    def change(draft: Draft) -> None:
        cells, chosen = draft.cells, np.asarray(order(draft.cells.n_obs), dtype=int)
        obs = cells.obs.iloc[chosen].set_axis([f"c{i}" for i in range(len(chosen))])
        draft.cells = ad.AnnData(cells.X[chosen], obs=obs, var=cells.var)

    return change


def genes_of_cells(order: Callable[[int], Any]) -> Change:
    def change(draft: Draft) -> None:
        draft.cells = draft.cells[:, order(draft.cells.n_vars)].copy()

    return change


def gene_name(new: str, *, position: int = 4) -> Change:
    def change(draft: Draft) -> None:
        names = draft.cells.var_names.tolist()
        names[position] = new
        draft.cells.var_names = names

    return change


def one_gene_more(draft: Draft) -> None:
    more = ad.AnnData(sparse.csr_matrix(np.ones((draft.cells.n_obs, 1), np.float32)), var=pd.DataFrame(index=["NEW"]))
    more.obs_names = draft.cells.obs_names
    obs = draft.cells.obs
    draft.cells = ad.concat([draft.cells, more], axis=1)
    draft.cells.obs = obs


def column_gone(column: str) -> Change:
    def change(draft: Draft) -> None:
        del draft.cells.obs[column]

    return change


def limit(**limits: int) -> Change:
    return lambda draft: draft.limits.update(limits)


def stored(offset: int) -> Change:
    return lambda draft: draft.limits.update(max_stored_values=int(np.count_nonzero(draft.dense)) + offset)


def cell_sum(offset: int) -> Change:
    def change(draft: Draft) -> None:
        values = draft.dense
        values[7, 0] += draft.limits["max_cell_sum"] + offset - values[7].sum()
        draft.dense = values

    return change


def counts(draft: Draft) -> None:
    draft.dense = np.rint(np.expm1(draft.dense)).astype(np.float32)


def scaled(most: float) -> Change:
    """Multiply all values, so that the largest becomes this."""
    return lambda draft: setattr(draft, "dense", (draft.dense * (most / draft.dense.max())).astype(np.float32))


def logged(draft: Draft) -> None:
    draft.dense = np.log1p(draft.dense)


def some_counts(draft: Draft) -> None:
    values = draft.dense
    values[[3, 30]] = np.rint(values[[3, 30]] * 1.5)
    draft.dense = values


def genes_list(*lines: str) -> Change:
    return lambda draft: setattr(draft, "genes", list(lines))


def targets_list(*lines: str) -> Change:
    return lambda draft: setattr(draft, "targets", list(lines))


def attribute(name: str, new: object) -> Change:
    return lambda draft: setattr(draft, name, new)


def ballast(draft: Draft) -> None:
    draft.cells.layers["more"] = draft.cells.X.copy()
    draft.cells.obsm["X_pca"] = np.ones((draft.cells.n_obs, 2))
    draft.cells.uns["note"] = "mine"
    draft.cells.obs["score"] = 1.5
    draft.cells.var["length"] = 7


def repeated_names(draft: Draft) -> None:
    def edit(file: Any) -> None:
        key = file["obs"].attrs["_index"]
        file["obs"][key][...] = "same"

    draft.raw.append(edit)


def unused_category(draft: Draft) -> None:
    values = pd.Categorical(draft.cells.obs["target_gene"], categories=[*TARGETS, CONTROL, "UNUSED"])
    draft.cells.obs["target_gene"] = values


def raw(edit: Callable[[Any], None]) -> Change:
    return lambda draft: draft.raw.append(edit)


def put(name: str, index: Any, new: float) -> Change:
    def edit(file: Any) -> None:
        file[name][index] = new

    return raw(edit)


def replaced(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Put an array that is made from the old one in its place."""

    def edit(file: Any) -> None:
        new = make(file[name][()])
        attributes = dict(file[name].attrs)
        del file[name]
        file.create_dataset(name, data=new).attrs.update(attributes)

    return raw(edit)


def twice_in_a_row(name: str) -> Change:
    """Make the second stored entry of the first cell one of the same gene as the first."""
    return put(name, 1, 0)


def unsorted(draft: Draft) -> None:
    def edit(file: Any) -> None:
        end = int(file["X/indptr"][1])
        for name in ("X/indices", "X/data"):
            file[name][:end] = file[name][:end][::-1]

    draft.raw.append(edit)


def slack(draft: Draft) -> None:
    for name in ("X/indices", "X/data"):
        replaced(name, lambda old: np.concatenate([old, old[:3]]))(draft)


def explicit_zero(draft: Draft) -> None:
    put("X/data", 1, 0)(draft)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_hdf5(path: Path) -> None:
    path.write_bytes(b"hello")


def one_cell_less(draft: Draft) -> None:
    draft.cells = draft.cells[1:].copy()
