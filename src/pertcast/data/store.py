"""The training store: a folder of arrays from which any cells are read.

Invariants: opening reads the manifest and the codes, not the values. Cells are returned as log1p, float32, on one
scale.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from pertcast.data.split import CodedCells, Split
from pertcast.data.store_arrays import HVG_PREFIX, StoredValues
from pertcast.errors import CheckpointError, DataError, Problem
from pertcast.files.artefacts import read_manifest
from pertcast.files.scales import Scale, normalise_log1p, normalising_factors

ALIGNMENT_BYTES = 64
"""What :meth:`Store.log1p` aligns its arrays to, as torch does."""


def _load(folder: Path, name: str, *, mapped: bool = False) -> np.ndarray:
    path = folder / f"{name}.npy"
    try:
        array: np.ndarray = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, error) from error
    # a plain view: slicing a memmap object costs a microsecond each time
    return np.asarray(array)


def _values(folder: Path, num_genes: int, *, prefix: str = "") -> StoredValues:
    try:
        return StoredValues(folder, num_genes=num_genes, prefix=prefix)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(folder / f"{prefix}data.npy", error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        problems=[Problem(str(path), f"missing or damaged ({error})", "run `pertcast prepare` again")]
    )


def _aligned_zeros(shape: tuple[int, int]) -> np.ndarray:
    """Return float32 zeros with torch's alignment, so that torch need not copy them."""
    size = shape[0] * shape[1]
    room = np.zeros(size + ALIGNMENT_BYTES // 4, dtype=np.float32)
    first = (-room.ctypes.data % ALIGNMENT_BYTES) // 4
    return room[first : first + size].reshape(shape)


class Screen(NamedTuple):
    """The cells of one dataset and context whose files measured the same genes."""

    dataset: int  # Codes of the store
    context: int
    panel: int  # A file of the screen; its row of ``Store.measured_FG`` is that of the screen


@dataclass(frozen=True, eq=False)
class Store(CodedCells):
    """A training store, opened for reading.

    Attributes
    ----------
    path, fingerprint
        The folder, and a hash of all that is in it.
    genes, perts, contexts, datasets, files, batches
        Names; codes are positions in them. A batch is of one file: with several files its name tells which.
    batch_labels
        What each batch is called in its own file.
    num_cells
        Cells, in the order of the files.
    scale
        Scale of the stored values; what is given out is log1p always.
    target_sum
        The total that counts are normalised to; of log1p input what it was normalised to, ``None`` where unknown.
    control, control_code
        The control label, and its code among `perts`.
    pert_codes, context_codes, dataset_codes, file_codes, batch_codes
        int32 (num_cells,); a batch of -1 is unknown.
    measured_FG
        bool (files, genes): which genes a file has. The others count as 0 in its cells, and have no effect there.
    split
        uint8 (num_cells,), :class:`Split` flags; 0 where a cell is not used.
    totals
        float32 (num_cells,), a cell's sum of counts over `genes` (of log1p input: of expm1).
    hvg
        int64, ascending positions of highly variable genes, fitted on TRAIN cells.
    control_mean_log1p
        float32 (genes,), mean of the TRAIN control cells.
    embedding_keys
        Embeddings that are stored.
    config, notes
        The resolved experiment that the store was made with, and what its user should know.
    """

    path: Path
    fingerprint: str
    genes: tuple[str, ...] = field(repr=False)
    perts: tuple[str, ...] = field(repr=False)
    contexts: tuple[str, ...]
    datasets: tuple[str, ...]
    files: tuple[str, ...] = field(repr=False)
    batches: tuple[str, ...] = field(repr=False)
    batch_labels: tuple[str, ...] = field(repr=False)
    num_cells: int
    scale: Scale
    target_sum: float | None
    control: str
    pert_codes: np.ndarray = field(repr=False)
    context_codes: np.ndarray = field(repr=False)
    dataset_codes: np.ndarray = field(repr=False)
    file_codes: np.ndarray = field(repr=False)
    measured_FG: np.ndarray = field(repr=False)
    batch_codes: np.ndarray = field(repr=False)
    split: np.ndarray = field(repr=False)
    totals: np.ndarray = field(repr=False)
    hvg: np.ndarray = field(repr=False)
    control_mean_log1p: np.ndarray = field(repr=False)
    embedding_keys: tuple[str, ...]
    config: dict[str, Any] = field(repr=False)
    notes: tuple[str, ...] = field(repr=False)
    _values: StoredValues = field(repr=False)
    _hvg_values: StoredValues | None = field(repr=False)
    _copied_genes: np.ndarray = field(repr=False)  # Of `_hvg_values`; a view of the store may have other HVGs
    _embeddings: dict[str, np.ndarray] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open the store in a folder.

        Raises
        ------
        CheckpointError
            If the folder is no store, or a file of it is missing or damaged.
        """
        manifest = read_manifest(path, kind="store")
        if "files" not in manifest.facts:
            message = "it was made by an older version, which did not keep the file of each cell"
            raise CheckpointError(problems=[Problem(str(path), message, "run `pertcast prepare` again")])
        facts, hvg = manifest.facts, _load(path, "hvg")
        content = json.dumps([manifest.files, facts], sort_keys=True)
        store = cls(
            path=path,
            fingerprint=hashlib.sha256(content.encode()).hexdigest(),
            genes=tuple(facts["genes"]),
            perts=tuple(facts["perts"]),
            contexts=tuple(facts["contexts"]),
            datasets=tuple(facts["datasets"]),
            files=tuple(facts["files"]),
            batches=tuple(facts["batches"]),
            batch_labels=tuple(facts["batch_labels"]),
            num_cells=facts["num_cells"],
            scale=facts["scale"],
            target_sum=facts["target_sum"],
            control=facts["control"],
            pert_codes=_load(path, "pert_codes"),
            context_codes=_load(path, "context_codes"),
            dataset_codes=_load(path, "dataset_codes"),
            file_codes=_load(path, "file_codes"),
            measured_FG=_load(path, "measured"),
            batch_codes=_load(path, "batch_codes"),
            split=_load(path, "split"),
            totals=_load(path, "totals"),
            hvg=hvg,
            control_mean_log1p=_load(path, "control_mean_log1p"),
            embedding_keys=tuple(facts["embedding_keys"]),
            config=manifest.config,
            notes=manifest.notes,
            _values=_values(path, len(facts["genes"])),
            # a store of many HVGs, or of an older pertcast, has no copy of theirs
            _hvg_values=_values(path, len(hvg), prefix=HVG_PREFIX)
            if f"{HVG_PREFIX}data.npy" in manifest.files
            else None,
            _copied_genes=hvg,
            _embeddings={key: _load(path, f"embedding_{key}", mapped=True) for key in facts["embedding_keys"]},
        )
        cells = {store.num_cells, len(store._values), *([len(store._hvg_values)] if store._hvg_values else [])}
        if len(cells) != 1 or store._values.num_values != facts["num_values"]:
            problem = Problem(str(path), "its arrays do not fit each other", "run `pertcast prepare` again")
            raise CheckpointError(problems=[problem])
        return store

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        """Pickle only the path, so that worker processes map the same pages."""
        return Store.open, (self.path,)

    @property
    def known_scale(self) -> Scale:
        """The scale of the stored values."""
        return self.scale

    @cached_property
    def _screens(self) -> tuple[tuple[Screen, ...], np.ndarray]:
        """All screens, sorted, and each cell's screen."""
        dataset_of = np.full(len(self.files), -1)
        dataset_of[self.file_codes] = self.dataset_codes
        first_with: dict[tuple[int, bytes], int] = {}
        panel_of = [
            first_with.setdefault((int(dataset), self.measured_FG[file].tobytes()), file)
            for file, dataset in enumerate(dataset_of)
        ]
        num_contexts = len(self.contexts)
        sources = self.file_codes.astype(np.int64) * num_contexts + self.context_codes
        present = np.flatnonzero(np.bincount(sources, minlength=len(self.files) * num_contexts))
        screen_of = {
            source: Screen(
                int(dataset_of[source // num_contexts]), source % num_contexts, panel_of[source // num_contexts]
            )
            for source in present.tolist()
        }
        screens = tuple(sorted(set(screen_of.values())))
        place = np.full(len(self.files) * num_contexts, -1, dtype=np.int32)
        place[present] = [screens.index(screen) for screen in screen_of.values()]
        return screens, place[sources]

    @property
    def screens(self) -> tuple[Screen, ...]:
        """The screens: datasets and contexts with cells, apart if files measured different genes."""
        return self._screens[0]

    @property
    def screen_codes(self) -> np.ndarray:
        """The position of each cell's screen in `screens`, int32 (num_cells,)."""
        return self._screens[1]

    @cached_property
    def measured_SG(self) -> np.ndarray | None:
        """The genes that each screen measured, bool (screens, genes); ``None`` if all measured all."""
        measured_SG: np.ndarray = self.measured_FG[[screen.panel for screen in self.screens]]
        return None if measured_SG.all() else measured_SG

    def screen_name(self, code: int) -> str:
        """Return "dataset.context" of a screen."""
        screen = self.screens[code]
        return f"{self.datasets[screen.dataset]}.{self.contexts[screen.context]}"

    def screen_rows(self, screen: int, *, split: Split, pert: int | None = None) -> np.ndarray:
        """Return the rows of a screen in any of the splits, and of a perturbation, ascending."""
        rows = self.rows(split=split, pert=pert)
        return np.asarray(rows[self.screen_codes[rows] == screen])

    def stored_values(self, genes: np.ndarray | None) -> tuple[StoredValues, np.ndarray | None]:
        """Return stored values that hold some genes, and the wanted place of each of theirs if they hold others, too.

        A place of -1 is of a gene that is not wanted.
        """
        if genes is None:
            return self._values, None
        if self._hvg_values is not None and np.array_equal(genes, self._copied_genes):
            return self._hvg_values, None
        positions = np.full(len(self.genes), -1, dtype=np.int64)
        positions[genes] = np.arange(len(genes))
        return self._values, positions

    def factors(self, rows: np.ndarray | None = None) -> np.ndarray | None:
        """Return what normalises the counts of rows, or of all cells, float32; ``None`` for log1p values."""
        if self.scale != "counts":
            return None
        factors: np.ndarray = normalising_factors(
            self.totals if rows is None else self.totals[rows], self.target_sum or 1.0
        )
        return factors

    def _checked(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.num_cells):
            raise IndexError(f"rows from {rows.min()} to {rows.max()} of a store of {self.num_cells} cells")
        return rows

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn a failed read into an error that names the store."""
        try:
            yield
        except OSError as error:
            problem = Problem(str(self.path), f"its values cannot be read ({error})", "run `pertcast prepare` again")
            raise CheckpointError(problems=[problem]) from error

    def _stored(self, rows: np.ndarray, genes: np.ndarray | None = None) -> sparse.csr_matrix:
        """Return stored values of rows, of all or some genes."""
        values, positions = self.stored_values(genes)
        with self.reading():
            block = values.read(self._checked(rows))
        return block if positions is None or genes is None else block[:, genes]

    def counts(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return whole counts of rows, CSR float32 (len(rows), genes).

        Raises
        ------
        DataError
            If the store was made of log1p values.
        """
        if self.scale != "counts":
            message = "it was made of log1p values, and counts are asked for"
            raise DataError(problems=[Problem(str(self.path), message, "prepare it from raw counts")])
        return self._stored(rows).astype(np.float32)

    def csr(self, rows: np.ndarray, *, genes: np.ndarray | None = None) -> sparse.csr_matrix:
        """Return log1p values of rows, CSR float32 (len(rows), genes).

        `genes` as in :meth:`log1p`.
        """
        block = self._stored(rows, genes)
        if self.scale == "log1p":
            return block
        return normalise_log1p(block, self.totals[np.asarray(rows)], self.target_sum or 1.0)

    def log1p(self, rows: np.ndarray, *, genes: np.ndarray | None = None) -> np.ndarray:
        """Return log1p values of rows, dense float32 (len(rows), genes), aligned to 64 bytes.

        Parameters
        ----------
        rows
            Positions of cells, in any order, repeats allowed.
        genes
            Positions of genes, in the order wanted, without repeats; all where not given.
        """
        rows, (values, positions) = self._checked(rows), self.stored_values(genes)
        dense = _aligned_zeros((len(rows), len(self.genes) if genes is None else len(genes)))
        with self.reading():
            values.write_log1p(rows, self.factors(rows), dense, positions=positions)
        return dense

    def embedding(self, rows: np.ndarray, key: str) -> np.ndarray:
        """Return the embeddings of rows, float32 (len(rows), dimensions).

        Raises
        ------
        CheckpointError
            If this embedding is not stored.
        """
        if key not in self._embeddings:
            known = ", ".join(self.embedding_keys) or "none"
            message = f"no embedding {key!r} is stored; there is {known}"
            remedy = f'set model.input = "obsm:{key}" and prepare again'
            raise CheckpointError(problems=[Problem(str(self.path), message, remedy)])
        return np.asarray(self._embeddings[key][rows])
