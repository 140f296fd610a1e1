"""Binds a run that was imported to a store: genes, controls, embeddings and batches are matched by name, or refused."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pertcast.data.store import Split, Store
from pertcast.errors import CheckpointError, Problem
from pertcast.models.checkpoint import Run

__all__ = ["batch_codes", "bind", "is_imported", "match_total"]

_SHOWN = 8
_ALL = Split.TRAIN | Split.VAL | Split.TEST
_OBSM = "obsm:"
_SAME_TOTAL = 0.01


def is_imported(run: Run) -> bool:
    """Return whether a run was trained elsewhere, and so has no store of its own."""
    return not run.store_fingerprint


def bind(run: Run, store: Store) -> Run:
    """Return an imported run as if it had been trained on a store: its genes are positions in the store's list.

    Raises
    ------
    CheckpointError
        With every name that the run needs and the store lacks.
    """
    if run.network.output_space == "embedding":
        raise CheckpointError(f"{run.path}: the network gives an embedding and no genes; import one that gives genes")
    problems = [*_gene_problems(run, store), *_input_problems(run, store), *_batch_problems(run, store)]
    if run.control != store.control:
        message = f"its control label is {run.control!r}, the store's is {store.control!r}"
        problems.append(Problem("controls", message, f"prepare the store with columns.control = {run.control!r}"))
    if problems:
        raise CheckpointError(f"{store.path}: the store does not fit the imported run {run.path}", problems=problems)
    place = {gene: position for position, gene in enumerate(store.genes)}
    outputs = np.array([place[gene] for gene in run.genes], dtype=np.int64)
    return replace(run, genes=store.genes, output_genes=outputs[run.output_genes], hvg=outputs[run.hvg])


def match_total(run: Run, store: Store) -> tuple[Store, list[str]]:
    """Return the store normalised to the total of an imported run's cells, and a note on it.

    Raises
    ------
    CheckpointError
        If the store has log1p values of another or an unknown total.
    """
    has = "an unknown total" if store.target_sum is None else f"{store.target_sum:,.6g}"
    if run.target_sum is None:
        remedy = "import it again with --target-sum to have it matched"
        return store, [f"the total that the run's cells were normalised to is unknown, the store's is {has}; {remedy}"]
    if store.target_sum is not None and abs(store.target_sum / run.target_sum - 1) <= _SAME_TOTAL:
        return store, []
    if store.scale != "counts":
        message = f"the run's cells were normalised to {run.target_sum:,.6g}, the store's log1p values to {has}"
        problem = Problem(f"{store.path}, target_sum", message, "prepare the store from raw counts")
        raise CheckpointError(f"{store.path}: the store does not fit the imported run {run.path}", problems=[problem])
    note = f"cells are normalised to {run.target_sum:,.6g}, as the run's were (the store's total is {has})"
    return replace(store, target_sum=run.target_sum), [note]


def batch_codes(run: Run, store: Store) -> NDArray[np.int64]:
    """Return the run's batch code of each of the store's batches, -1 where it has none; the last is the unknown one."""
    known = {name: code for code, name in enumerate(run.batches)}
    return np.array([*(known.get(name, -1) for name in _batch_names(run, store)), -1], dtype=np.int64)


def _batch_names(run: Run, store: Store) -> tuple[str, ...]:
    """Return what the run calls the store's batches: an imported run knows no files, and so their labels alone."""
    return store.batch_labels if is_imported(run) else store.batches


def _gene_problems(run: Run, store: Store) -> list[Problem]:
    lost = sorted(set(run.genes) - set(store.genes))
    if not lost:
        return []
    near = difflib.get_close_matches(lost[0], store.genes, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    message = f"{len(lost):,} of the {len(run.genes):,} genes of the network are not there: {_some(lost)}{hint}"
    return [Problem("genes", message, "prepare the store from cells that have them, under these names")]


def _input_problems(run: Run, store: Store) -> list[Problem]:
    source = run.experiment["model"]["input"]
    if not source.startswith(_OBSM):
        return []
    key = source.removeprefix(_OBSM)
    remedy = f"prepare it with model.input = {source!r}"
    if key not in store.embedding_keys:
        return [Problem("embedding", f"the network reads {key!r}, the store has {_some(store.embedding_keys)}", remedy)]
    width = store.embedding(np.zeros(1, dtype=np.int64), key).shape[1]
    if width != run.network.input_dim:
        return [Problem("embedding", f"expected {key!r} to be {run.network.input_dim} wide, got {width}", remedy)]
    return []


def _batch_problems(run: Run, store: Store) -> list[Problem]:
    if not run.network.num_batches:
        return []
    used = np.unique(store.batch_codes[store.rows(split=_ALL, pert=store.perts.index(store.control))])
    known = _batch_names(run, store)
    names = [known[code] if code >= 0 else "(unknown)" for code in used]
    lost = [name for name in names if name not in run.batches]
    if not lost:
        return []
    message = f"{len(lost)} batches of control cells are not known to the network: {_some(lost)}"
    remedy = f"it knows {_some(run.batches)}; prepare the store from cells of these"
    return [Problem("batches", message, remedy)]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return (", ".join(repr(name) for name in names[:_SHOWN]) + more) or "none"
