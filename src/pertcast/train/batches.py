"""Batches for the loop: an endless stream of cell sets with a position, read ahead by threads.

Shapes: B sets, S cells in a set, I input width, F width of a perturbation feature, O output width, G predicted genes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pertcast.config import Experiment, TrainConfig
from pertcast.data.cell_sets import CellSets, training_sets
from pertcast.data.features import PertFeatures
from pertcast.data.inputs import SparseCells, as_tensor, input_dim, read_inputs
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import ConfigError, DataError
from pertcast.files.resources import available_cpus, prefetch
from pertcast.models.spec import StateSpec, spec_for
from pertcast.stats.draws import generator
from pertcast.train.baseline import TrainingBase

_MOST_THREADS = 4


class StreamState(NamedTuple):
    """The position in a stream of sets: `offset` sets of `epoch` are done."""

    epoch: int
    offset: int


class Batch(NamedTuple):
    """Some sets as tensors; `real_BSO` is in the network's output space, `genes_BSG` only in latent space."""

    control_BSI: Tensor
    pert_BF: Tensor
    batch_BS: Tensor
    context_B: Tensor
    real_BSO: Tensor
    genes_BSG: Tensor | None
    pert_B: Tensor
    base_BG: Tensor | None = None
    depth_BS: Tensor | None = None
    screen_B: Tensor | None = None
    measured_BG: Tensor | None = None

    def for_network(self) -> tuple[Tensor | None, ...]:
        """Return the network's arguments in order."""
        return self.control_BSI, self.pert_BF, self.batch_BS, self.context_B, self.base_BG


class SetStream:
    """Sets of one epoch after another; a batch may span two epochs, so no cell is left out."""

    def __init__(self, epoch_sets: Callable[[int], CellSets], place: StreamState) -> None:
        self._epoch_sets = epoch_sets
        self._place = place
        self._sets: CellSets | None = None

    def take(self, num: int) -> tuple[CellSets, StreamState]:
        """Return the next sets, and the position after them."""
        pieces: list[CellSets] = []
        while num:
            if self._sets is None:
                self._sets = self._epoch_sets(self._place.epoch)
                if not len(self._sets):
                    raise DataError("no cell sets to train on: the store has no training cells; correct [training]")
            piece = self._sets[self._place.offset : self._place.offset + num]
            pieces.append(piece)
            num -= len(piece)
            self._place = StreamState(self._place.epoch, self._place.offset + len(piece))
            if self._place.offset >= len(self._sets):
                self._place, self._sets = StreamState(self._place.epoch + 1, 0), None
        return _concatenate(pieces), self._place


def _concatenate(pieces: list[CellSets]) -> CellSets:
    if len(pieces) == 1:
        return pieces[0]
    return CellSets(
        pert=np.concatenate([piece.pert for piece in pieces]),
        context=np.concatenate([piece.context for piece in pieces]),
        screen=np.concatenate([piece.screen for piece in pieces]),
        pert_rows=np.concatenate([piece.pert_rows for piece in pieces]),
        control_rows=np.concatenate([piece.control_rows for piece in pieces]),
    )


class SetReader:
    """Turn sets of row numbers into tensors for an experiment's network."""

    def __init__(self, store: Store, experiment: Experiment, features: PertFeatures, *, sparse: bool = False) -> None:
        self._store, self._experiment, self._is_sparse = store, experiment, sparse
        self.base: TrainingBase | None = None
        self._pert_PF = torch.from_numpy(features.of(store.perts)).clone()
        self._is_latent = experiment.model.input.startswith("obsm:")
        model = experiment.model
        if model.batch_embedding and not store.batches:
            raise ConfigError(
                f"[model] batch_embedding: the store {store.path} has no batches; "
                "name their column in columns.batch and prepare it again, or switch batch_embedding off"
            )
        trained = np.unique(store.batch_codes[(store.split & Split.TRAIN) != 0])
        self.untrained_batches = np.setdiff1d(np.arange(len(store.batches)), trained)
        # the last is the unknown batch, whose code is -1
        self._batch_rows = np.append(np.arange(len(store.batches)), -1)
        self._batch_rows[self.untrained_batches] = -1
        self.output_genes = store.hvg if model.output == "hvg" else np.arange(len(store.genes))
        measured_SG = store.measured_SG
        self._measured_SG = None if measured_SG is None else torch.from_numpy(measured_SG[:, self.output_genes])
        width = input_dim(store, source=model.input)
        self.spec: StateSpec = spec_for(
            model,
            num_genes=len(self.output_genes),
            input_dim=width,
            output_dim=width if self._is_latent else len(self.output_genes),
            pert_dim=features.dim,
            num_batches=len(store.batches),
            num_contexts=len(store.contexts),
        )

    @property
    def threads(self) -> int:
        """The number of batches to read at once: more for a GPU, which is faster than one thread."""
        return min(_MOST_THREADS, available_cpus()) if self._is_sparse else 1

    @property
    def reads_what_it_predicts(self) -> bool:
        """Whether the network reads the genes that it predicts, so that an effect has its own controls."""
        return self._experiment.model.input == self._experiment.model.output

    @cached_property
    def feature_size(self) -> float:
        """The root mean square of the features of training perturbations."""
        store = self._store
        trained = np.unique(store.pert_codes[store.rows(split=Split.TRAIN)])
        features_PF = self._pert_PF[torch.from_numpy(trained[trained != store.control_code].astype(np.int64))]
        return float(features_PF.double().square().mean().sqrt()) if len(features_PF) else 0.0

    @property
    def control_code(self) -> int:
        """The code of the control label among perturbations."""
        return self._store.control_code

    def training(self, epoch: int, *, control_sets: bool | None = None) -> CellSets:
        """Return the training sets of an epoch; the experiment or the caller decides on control sets."""
        asked = self._experiment.train.control_sets if control_sets is None else control_sets
        return self._sets(epoch, Split.TRAIN, control_sets=asked)

    def validation(self) -> CellSets:
        """Return the validation sets, always the same, of perturbations alone."""
        config = self._experiment.train
        return self._sets(0, Split.VAL, control_sets=False)[: config.max_val_sets]

    def _sets(self, epoch: int, split: Split, *, control_sets: bool) -> CellSets:
        config = self._experiment.train
        return training_sets(
            self._store,
            set_size=self.spec.set_size,
            seed=config.seed,
            epoch=epoch,
            split=split,
            match=config.match,
            control_sets=control_sets,
        )

    def read(self, sets: CellSets) -> Batch:
        """Return sets as tensors."""
        store, shape = self._store, sets.pert_rows.shape
        controls, perturbed = sets.control_rows.reshape(-1), sets.pert_rows.reshape(-1)
        # both at once: the disk has all requests at hand, and array arithmetic lets go of the interpreter
        with ThreadPoolExecutor(1, thread_name_prefix="pertcast-controls") as beside:
            reading = beside.submit(self._inputs, controls, shape)
            genes_BSG = self._genes(perturbed, shape, self._gene_choice())
            control_BSI = reading.result()
        return Batch(
            control_BSI=control_BSI,
            pert_BF=_pinned(self._pert_PF[torch.from_numpy(sets.pert.astype(np.int64))]),
            batch_BS=self._tensor(self._batch_rows[store.batch_codes[controls]], shape),
            context_B=torch.from_numpy(sets.context.astype(np.int64)),
            real_BSO=self._inputs(perturbed, shape) if self._is_latent else genes_BSG,
            genes_BSG=genes_BSG if self._is_latent else None,
            pert_B=torch.from_numpy(sets.pert.astype(np.int64)),
            base_BG=None if self.base is None else _pinned(torch.from_numpy(self.base.of(sets))),
            screen_B=torch.from_numpy(sets.screen.astype(np.int64)),
            measured_BG=self.measured(sets),
            depth_BS=self._tensor(store.totals[perturbed] / np.float32(store.target_sum), shape)
            if store.scale == "counts" and store.target_sum
            else None,
        )

    def measured(self, sets: CellSets) -> Tensor | None:
        """Return which predicted genes each set's screen measured, (B, G); ``None`` if all were measured."""
        return None if self._measured_SG is None else _pinned(self._measured_SG[torch.from_numpy(sets.screen).long()])

    def _inputs(self, rows: NDArray[np.int64], shape: tuple[int, ...]) -> Tensor:
        source = self._experiment.model.input
        if self._is_sparse and not self._is_latent:
            return self._genes(rows, shape, self._store.hvg if source == "hvg" else None)
        return self._tensor(read_inputs(self._store, rows, source=source), shape)

    def _genes(self, rows: NDArray[np.int64], shape: tuple[int, ...], genes: NDArray[np.int64] | None) -> Tensor:
        if self._is_sparse:
            # A tensor as soon as the batch has been moved, which everyone does first.
            return cast("Tensor", SparseCells(self._store.csr(rows, genes=genes), shape))
        return self._tensor(self._store.log1p(rows, genes=genes), shape)

    def _gene_choice(self) -> NDArray[np.int64] | None:
        return self.output_genes if len(self.output_genes) < len(self._store.genes) else None

    @staticmethod
    def _tensor(values: NDArray[np.generic], shape: tuple[int, ...]) -> Tensor:
        return _pinned(as_tensor(values).reshape(*shape, *values.shape[1:]))


def _pinned(tensor: Tensor) -> Tensor:
    """Return a tensor in pinned memory, from which a GPU copies asynchronously."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def read_ahead(
    stream: Iterator[tuple[CellSets, StreamState]], read: Callable[[CellSets], Batch], *, threads: int = 1
) -> Iterator[tuple[Batch, StreamState]]:
    """Yield ``read(piece)`` for each piece of the stream, reading the next ones in threads."""
    return prefetch(stream, lambda piece: (read(piece[0]), piece[1]), threads=threads)


def augment(batch: Batch, reader: SetReader, config: TrainConfig, keys: Sequence[tuple[str | int, ...]]) -> Batch:
    """Return a training batch with batch dropout and feature noise."""
    if config.batch_dropout and reader.spec.unknown_batch:
        draws = [generator(config.seed, "no batch", *key).random() for key in keys]
        batch = forget_batches(batch, [draw < config.batch_dropout for draw in draws])
    if config.feature_noise:
        width = batch.pert_BF.shape[1]
        noise_BF = np.stack([generator(config.seed, "feature noise", *key).normal(size=width) for key in keys])
        noise_BF *= config.feature_noise * reader.feature_size
        batch = blur_features(batch, torch.from_numpy(noise_BF), control_code=reader.control_code)
    return batch


def forget_batches(batch: Batch, forgotten: Sequence[bool]) -> Batch:
    """Return a batch in which some sets have no known batch (code -1)."""
    return batch._replace(batch_BS=torch.where(torch.tensor(forgotten)[:, None], -1, batch.batch_BS))


def blur_features(batch: Batch, noise_BF: Tensor, *, control_code: int) -> Batch:
    """Return a batch with noise on perturbation features, except of control sets."""
    is_perturbed_B1 = (batch.pert_B != control_code)[:, None]
    return batch._replace(pert_BF=batch.pert_BF + noise_BF.to(batch.pert_BF.dtype) * is_perturbed_B1)
