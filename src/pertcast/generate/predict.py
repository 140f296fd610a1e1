"""Predict the cells of one target from a run: network, baseline or imported run.

A predictor maps (control cells, target, context) to predicted cells. How cells are made and written is decided
elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from threading import Lock
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pertcast.data.features import PertFeatures
from pertcast.data.inputs import as_tensor, read_inputs
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import CheckpointError, Problem
from pertcast.files.obs import near_misses
from pertcast.generate.control_codes import ControlCodes
from pertcast.models.baselines import Baseline, BaselineSpec, predict_effects
from pertcast.models.folded import FoldedNetwork
from pertcast.models.heads import COUNTS_HEAD_PREFIX, LOG_SHAPES
from pertcast.models.run_folder import WEIGHTS, Run, load_tensors
from pertcast.models.state import Prediction
from pertcast.processes import launched

_SHOWN = 8
_ALL = Split.TRAIN | Split.VAL | Split.TEST
_OBSM = "obsm:"
_SAME_TOTAL = 0.01


def is_imported(run: Run) -> bool:
    """Return whether a run was imported, and so has no store of its own."""
    return not run.store_fingerprint


def bind(run: Run, store: Store) -> Run:
    """Return an imported run with its genes as positions in a store's list."""
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
    """Return the store normalised to the total of an imported run's cells, with a note."""
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
    """Return the run's code of each batch of the store, -1 if it has none; the last is the unknown batch."""
    known = {name: code for code, name in enumerate(run.batches)}
    return np.array([*(known.get(name, -1) for name in _batch_names(run, store)), -1], dtype=np.int64)


def _batch_names(run: Run, store: Store) -> tuple[str, ...]:
    """Return the run's names of the store's batches; an imported run knows only their labels."""
    return store.batch_labels if is_imported(run) else store.batches


def _gene_problems(run: Run, store: Store) -> list[Problem]:
    lost = sorted(set(run.genes) - set(store.genes))
    if not lost:
        return []
    near = near_misses(lost[0], store.genes)
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


class Predictor(Protocol):
    """The interface of a predictor: (control cells, target, context) → predicted cells."""

    def predict(self, rows_BS: NDArray[np.int64], *, target: str, context: str) -> NDArray[np.float32]:
        """Return (B * S, output genes) log1p values, in the order of the control cells."""
        ...


def make_predictor(run: Run, store: Store, features: PertFeatures) -> Predictor:
    """Return the predictor of a run; its weights are read when the first cells are needed."""
    if isinstance(run.spec, BaselineSpec):
        return BaselinePredictor(run, store, features)
    return NetworkPredictor(run, store, features)


class BaseEffects:
    """The effects that a run's baseline predicts in the contexts of a store."""

    def __init__(self, run: Run, baseline: Baseline, store: Store, features: PertFeatures) -> None:
        self._run, self._baseline, self._store, self._features = run, baseline, store, features

    def of(self, target: str, context: str) -> NDArray[np.float32]:
        """Return (output genes,) log1p differences; 0 for the control label."""
        if target == self._store.control:
            return np.zeros(self._baseline.spec.num_genes, dtype=np.float32)
        code = self._run.contexts.index(context) if context in self._run.contexts else -1
        effect_PG = predict_effects(self._baseline, self._features.of([target]), context=code)
        return effect_PG.reshape(-1)


class BaselinePredictor:
    """A fitted baseline: the control cell plus the effect of the target."""

    def __init__(self, run: Run, store: Store, features: PertFeatures) -> None:
        baseline = run.baseline()
        assert baseline is not None
        self._run, self._store, self._effects = run, store, BaseEffects(run, baseline, store, features)

    def predict(self, rows_BS: NDArray[np.int64], *, target: str, context: str) -> NDArray[np.float32]:
        """Return (B * S, output genes) log1p values."""
        is_whole = len(self._run.output_genes) == len(self._store.genes)
        control_CO = self._store.log1p(rows_BS.reshape(-1), genes=None if is_whole else self._run.output_genes)
        return control_CO + self._effects.of(target, context)


_MOST_AT_ONCE = 4


@contextmanager
def predicting_threads() -> Iterator[int]:
    """Give the number of threads that predict at the same time, each with its share of torch's own threads.

    Threads that predict cells of their own wait for each other less than threads that share each product.
    """
    shared = torch.get_num_threads()
    number = min(shared, _MOST_AT_ONCE)
    torch.set_num_threads(shared // number)
    try:
        yield number
    finally:
        torch.set_num_threads(shared)


class NetworkPredictor:
    """A State Transition network on one device; several threads may predict."""

    def __init__(self, run: Run, store: Store, features: PertFeatures, *, counts_head: bool = False) -> None:
        self._counts_head = counts_head
        self._encoding = Lock()
        self._run, self._store, self._features = run, store, features
        self._device = _own_device()
        self._source = str(run.experiment["model"]["input"])
        # an imported or adapted run has its own genes and batches
        self._input_genes = run.hvg if is_imported(run) or self._source == "hvg" else None
        self._batch_codes = batch_codes(run, store)
        baseline = run.baseline()
        self._base = BaseEffects(run, baseline, store, features) if baseline is not None else None

    def predict(self, rows_BS: NDArray[np.int64], *, target: str, context: str) -> NDArray[np.float32]:
        """Return (B * S, output genes) log1p values."""
        prediction = self.prediction(rows_BS, target=target, context=context)
        return prediction.unclipped_BSG.flatten(0, 1).float().cpu().numpy()

    @cached_property
    def _network(self) -> FoldedNetwork:
        """The network, on its device; its weights are read here."""
        return FoldedNetwork(self._run.model(counts_head=self._counts_head).to(self._device))

    @cached_property
    def _codes(self) -> ControlCodes:
        def encode(cells_CI: NDArray[np.float32]) -> torch.Tensor:
            return self._network.encode(self._tensor(cells_CI))

        width, num_cells = self._network.code_width, self._store.num_cells
        return ControlCodes(self._read, encode, width=width, num_cells=num_cells, device=self._device)

    def _read(self, rows_C: NDArray[np.int64]) -> NDArray[np.float32]:
        return read_inputs(self._store, rows_C, source=self._source, genes=self._input_genes)

    @torch.inference_mode()
    def prediction(self, rows_BS: NDArray[np.int64], *, target: str, context: str) -> Prediction:
        """Return the network's whole prediction for sets of rows of control cells."""
        rows_C, num_sets = rows_BS.reshape(-1), len(rows_BS)
        batch_BS = self._batch_codes[self._store.batch_codes[rows_BS]]
        context_code = self._run.contexts.index(context) if context in self._run.contexts else -1
        with self._encoding:
            code_CH = self._codes.of(rows_C)
        return self._network.predict(
            code_CH.reshape(*rows_BS.shape, -1),
            self._tensor(self._features.of([target])).expand(num_sets, -1),
            self._tensor(batch_BS),
            torch.full((num_sets,), context_code, device=self._device),
            base_BG=None if self._base is None else self._tensor(self._base.of(target, context)).expand(num_sets, -1),
            control_BSI=self._tensor(self._read(rows_C)).reshape(*rows_BS.shape, -1)
            if self._network.needs_controls
            else None,
        )

    def _tensor(self, values: NDArray[np.generic]) -> torch.Tensor:
        return as_tensor(values).to(self._device)


def _own_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    ranks = launched()
    return torch.device("cuda", 0 if ranks is None else ranks.local_rank % torch.cuda.device_count())


class CentredPredictor:
    """Add to the control cell only what the target changes in the control condition's prediction."""

    def __init__(self, predictor: Predictor, store: Store, *, output_genes: NDArray[np.int64]) -> None:
        self._predictor, self._store = predictor, store
        self._genes = None if len(output_genes) == len(store.genes) else output_genes

    def predict(self, rows_BS: NDArray[np.int64], *, target: str, context: str) -> NDArray[np.float32]:
        """Return (B * S, output genes) log1p values."""
        control_CO: NDArray[np.float32] = self._store.log1p(rows_BS.reshape(-1), genes=self._genes)
        if target != self._store.control:
            control_CO += self._predictor.predict(rows_BS, target=target, context=context)
            control_CO -= self._predictor.predict(rows_BS, target=self._store.control, context=context)
        return control_CO


def shapes_of(run: Run) -> NDArray[np.float64]:
    """Return 1 / dispersion of each gene that a run's counts head predicts, (O,)."""
    log_shape_O = load_tensors(run.path / WEIGHTS).get(f"{COUNTS_HEAD_PREFIX}log_shape_G")
    if log_shape_O is None:
        raise CheckpointError(
            f'{run.path}: generate.cells = "nb_head" draws cells from a counts head, and this run has none; train one '
            "with loss.nb above 0, or choose another way to make cells (donors)"
        )
    return log_shape_O.double().clamp(*LOG_SHAPES).exp().numpy()


class CountsHeadPredictor:
    """Return log fold changes of each cell's rates; unpredicted genes do not change."""

    def __init__(self, run: Run, store: Store, features: PertFeatures) -> None:
        self._network = NetworkPredictor(run, store, features, counts_head=True)

    def predict(self, rows_BS: NDArray[np.int64], *, target: str, context: str) -> NDArray[np.float32]:
        """Return (B * S, output genes) log fold changes."""
        counts = self._network.prediction(rows_BS, target=target, context=context).counts
        assert counts is not None
        log_fold_BO = counts.log_fold_BG.float().cpu().numpy()
        return np.repeat(log_fold_BO, rows_BS.shape[1], axis=0)
