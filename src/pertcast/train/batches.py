"""Batches for the loop: an endless stream of cell sets with a position, as numbers; and dense tensors of their cells.

Cells stay on the device, or the host reads those of the next batch in a thread. Shapes: B sets, S cells in a set, X
numbers of a set, I input width, F width of a perturbation feature, O output width, G predicted genes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pertcast.config import Experiment, TrainConfig
from pertcast.data.cell_sets import CellSets, training_sets
from pertcast.data.device_cells import room_for_cells
from pertcast.data.features import PertFeatures
from pertcast.data.inputs import Values, Way, pinned, source_of
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import ConfigError, DataError
from pertcast.files.resources import prefetch, size_text
from pertcast.models.heads import dropout_keys
from pertcast.models.spec import StateSpec, spec_for
from pertcast.stats.draws import generator
from pertcast.train.baseline import TrainingBase

_NUM_SINGLES = 3


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


@dataclass(frozen=True)
class Codes:
    """Some sets as numbers, int64 (B, X): perturbation, context, screen, S perturbed rows, S control rows."""

    host: Tensor
    device: Tensor  # The same, or their copy on a device where the cells stay

    @classmethod
    def of(cls, sets: CellSets) -> Codes:
        """Return the numbers of some sets on the host."""
        singles = np.stack([sets.pert, sets.context, sets.screen], axis=1)
        host = pinned(torch.from_numpy(np.concatenate([singles, sets.pert_rows, sets.control_rows], axis=1)))
        return cls(host, host)

    def to(self, device: torch.device) -> Codes:
        """Return them with a copy on a device."""
        return Codes(self.host, self.host.to(device, non_blocking=True))

    def __len__(self) -> int:
        """Return B."""
        return len(self.host)

    def __getitem__(self, item: slice | NDArray[np.int64]) -> Codes:
        """Return some of the sets in order."""
        return Codes(self.host[item], self.device[item])

    @property
    def groups(self) -> list[tuple[int, int]]:
        """The context and perturbation of each set."""
        return [(context, pert) for pert, context in self.host[:, :2].tolist()]


def _rows(codes_BX: Tensor) -> Tensor:
    """Return the rows of the perturbed and of the control cells, (2, B * S)."""
    return codes_BX[:, _NUM_SINGLES:].reshape(len(codes_BX), 2, -1).transpose(0, 1).flatten(1)


class SetStream:
    """Sets of one epoch after another; a batch may span two epochs, so no cell is left out.

    A thread draws the next epoch. Its numbers go to the device in one copy, by the thread that takes them.
    """

    def __init__(
        self, epoch_sets: Callable[[int], CellSets], place: StreamState, device: torch.device | str = "cpu"
    ) -> None:
        self._epoch_sets, self._device = epoch_sets, torch.device(device)
        self._place = place
        self._sets: Codes | None = None
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="pertcast-epoch")
        self._next = self._draw(place.epoch)

    def _draw(self, epoch: int) -> Future[Codes]:
        return self._ahead.submit(lambda: Codes.of(self._epoch_sets(epoch)))

    def take(self, num: int) -> tuple[Codes, StreamState]:
        """Return the next sets, and the position after them."""
        pieces: list[Codes] = []
        while num:
            if self._sets is None:
                self._sets = self._next.result().to(self._device)
                if not len(self._sets):
                    raise DataError("no cell sets to train on: the store has no training cells; correct [training]")
                self._next = self._draw(self._place.epoch + 1)
            piece = self._sets[self._place.offset : self._place.offset + num]
            pieces.append(piece)
            num -= len(piece)
            self._place = StreamState(self._place.epoch, self._place.offset + len(piece))
            if self._place.offset >= len(self._sets):
                self._place, self._sets = StreamState(self._place.epoch + 1, 0), None
        if len(pieces) == 1:
            return pieces[0], self._place
        host, device = (
            torch.cat(parts) for parts in zip(*((piece.host, piece.device) for piece in pieces), strict=True)
        )
        return Codes(host, device), self._place


class Fetched(NamedTuple):
    """What the host has read for a batch; ``None`` is what the device has already."""

    inputs: Values
    genes: Values
    base_BG: Tensor | None


class SetReader:
    """Turn sets of row numbers into tensors for an experiment's network."""

    def __init__(self, store: Store, experiment: Experiment, features: PertFeatures) -> None:
        self._store, self._experiment = store, experiment
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
        batch_rows = np.append(np.arange(len(store.batches)), -1)
        batch_rows[self.untrained_batches] = -1
        self._batch_N = torch.from_numpy(batch_rows[store.batch_codes])
        self._depth_N: Tensor | None = None
        if store.scale == "counts" and store.target_sum:
            self._depth_N = torch.from_numpy(store.totals / np.float32(store.target_sum))
        self.output_genes = store.hvg if model.output == "hvg" else np.arange(len(store.genes))
        measured_SG = store.measured_SG
        self._measured_SG = None if measured_SG is None else torch.from_numpy(measured_SG[:, self.output_genes])
        self._inputs = source_of(store, model.input)
        # one gather serves both kinds of cells where the network reads what it predicts
        self._genes = self._inputs if self.reads_what_it_predicts else source_of(store, model.output)
        self.spec: StateSpec = spec_for(
            model,
            num_genes=len(self.output_genes),
            input_dim=self._inputs.width,
            output_dim=self._inputs.width if self._is_latent else len(self.output_genes),
            pert_dim=features.dim,
            num_batches=len(store.batches),
            num_contexts=len(store.contexts),
        )
        self.device, self.is_resident = torch.device("cpu"), False

    def place(self, device: torch.device, cells: Literal["auto", "device", "host"]) -> str:
        """Choose the device of batches and where cells are kept; return a sentence on it."""
        sources = {id(source): source for source in (self._inputs, self._genes)}.values()
        size, room = sum(source.num_bytes for source in sources), room_for_cells(device)
        self.device, self.is_resident = device, cells == "device" or (cells == "auto" and size <= room)
        way: Way = "resident" if self.is_resident else "dense" if device.type == "cpu" else "packed"
        try:
            for source in sources:
                source.place(device, way)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"[train] cells: all cells take {size_text(size)}, and {device} has less free; "
                'set train.cells to "auto" or "host"'
            ) from error
        for name in ("_pert_PF", "_batch_N", "_depth_N", "_measured_SG"):
            if (table := getattr(self, name)) is not None:
                setattr(self, name, table.to(device))
        if self.is_resident:
            return f"cells: {size_text(size)}, all on {device}"
        why = "" if device.type == "cpu" or cells == "host" else f"; all would need {size_text(size)} on {device}"
        return f"cells: read from the store for each batch, one batch ahead{why}"

    @property
    def reads_what_it_predicts(self) -> bool:
        """Whether the network reads the genes that it predicts, so that an effect has its own controls."""
        return self._experiment.model.input == self._experiment.model.output

    @cached_property
    def feature_size(self) -> float:
        """The root mean square of the features of training perturbations."""
        store = self._store
        trained = np.unique(store.pert_codes[store.rows(split=Split.TRAIN)])
        features_PF = self._pert_PF.cpu()[torch.from_numpy(trained[trained != store.control_code].astype(np.int64))]
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

    @property
    def codes_device(self) -> torch.device:
        """Where the numbers of sets are needed."""
        return self.device if self.is_resident else torch.device("cpu")

    def codes(self, sets: CellSets) -> Codes:
        """Return sets as numbers, where batches are made from them."""
        return Codes.of(sets).to(self.codes_device)

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
        """Return sets as tensors on the reader's device."""
        codes = self.codes(sets)
        return self.batch(codes.device, self.fetch(codes))

    def fetch(self, codes: Codes) -> Fetched:
        """Do the host's part of reading some sets; it may run in a thread."""
        rows_2R = _rows(codes.host).numpy()
        inputs, genes = self._wanted(rows_2R)
        base_BG = None
        if self.base is not None:
            base_BG = pinned(torch.from_numpy(self.base.of(codes.groups)))
            base_BG = base_BG.to(self.device, non_blocking=True) if self.is_resident else base_BG
        genes_fetched = None if genes is None else self._genes.fetch(genes)
        return Fetched(self._inputs.fetch(inputs), genes_fetched, base_BG)

    def _wanted(self, rows_2R: Any) -> tuple[Any, Any]:
        """Return the rows whose inputs are needed and, where that is not the same, those whose genes are."""
        perturbed_R, control_R = rows_2R
        if self.reads_what_it_predicts:
            return rows_2R.reshape(-1), None
        return (rows_2R.reshape(-1), perturbed_R) if self._is_latent else (control_R, perturbed_R)

    def batch(self, codes_BX: Tensor, fetched: Fetched) -> Batch:
        """Return sets as tensors on the reader's device, from what :meth:`fetch` returned."""
        codes_BX = codes_BX.to(self.device, non_blocking=True)
        pert_B, context_B, screen_B = codes_BX[:, :_NUM_SINGLES].unbind(1)
        rows_2R = _rows(codes_BX)
        inputs, genes = self._wanted(rows_2R)
        shape = (len(codes_BX), self.spec.set_size, -1)
        read = self._inputs.dense(inputs, fetched.inputs)
        real, control = read.chunk(2) if len(inputs) > rows_2R.shape[1] else (None, read)
        genes_BSG = None if genes is None else self._genes.dense(genes, fetched.genes).view(shape)
        real_BSO = genes_BSG if real is None else real.view(shape)
        assert real_BSO is not None
        return Batch(
            control_BSI=control.view(shape),
            pert_BF=self._pert_PF[pert_B],
            batch_BS=self._batch_N[rows_2R[1]].view(shape[:2]),
            context_B=context_B,
            real_BSO=real_BSO,
            genes_BSG=genes_BSG if self._is_latent else None,
            pert_B=pert_B,
            base_BG=None if fetched.base_BG is None else fetched.base_BG.to(self.device, non_blocking=True),
            depth_BS=None if self._depth_N is None else self._depth_N[rows_2R[0]].view(shape[:2]),
            screen_B=screen_B,
            measured_BG=self.measured(screen_B),
        )

    def measured(self, screen_B: Tensor) -> Tensor | None:
        """Return which predicted genes each set's screen measured, (B, G); ``None`` if all were measured."""
        return None if self._measured_SG is None else self._measured_SG[screen_B]

    def batches(self, stream: Iterator[tuple[Codes, StreamState]]) -> Iterator[tuple[Codes, Fetched, StreamState]]:
        """Yield each piece of a stream with what the host has read for it, in a thread, one batch ahead."""
        if self.is_resident:
            return ((codes, self.fetch(codes), place) for codes, place in stream)
        return prefetch(stream, lambda piece: (piece[0], self.fetch(piece[0]), piece[1]))


class Draws(NamedTuple):
    """What is drawn for the sets of a step, each from its own key; ``None`` is what the experiment does not need."""

    keys_B2: Tensor | None = None  # Of dropout
    forgotten_B: Tensor | None = None  # Sets whose batch counts as unknown
    noise_BF: Tensor | None = None  # Added to perturbation features
    others_BK: Tensor | None = None  # Training perturbations to rank against; drawn by `TrainingTargets`

    def to(self, device: torch.device) -> Draws:
        """Return the draws on a device."""
        return Draws(*(None if value is None else pinned(value).to(device, non_blocking=True) for value in self))


def draws_of(reader: SetReader, config: TrainConfig, keys: Sequence[tuple[str | int, ...]]) -> Draws:
    """Draw dropout keys, batch dropout and feature noise for the sets of a step."""
    forgotten_B, noise_BF = None, None
    if config.batch_dropout and reader.spec.unknown_batch:
        shares = [generator(config.seed, "no batch", *key).random() for key in keys]
        forgotten_B = torch.tensor([share < config.batch_dropout for share in shares])
    if config.feature_noise:
        width = reader.spec.pert_dim
        noise = np.stack([generator(config.seed, "feature noise", *key).normal(size=width) for key in keys])
        noise_BF = torch.from_numpy(noise * (config.feature_noise * reader.feature_size)).float()
    return Draws(dropout_keys(config.seed, keys), forgotten_B, noise_BF)


def augment(batch: Batch, draws: Draws, *, control_code: int) -> Batch:
    """Return a training batch with batch dropout and feature noise."""
    if draws.forgotten_B is not None:
        batch = forget_batches(batch, draws.forgotten_B)
    if draws.noise_BF is not None:
        batch = blur_features(batch, draws.noise_BF, control_code=control_code)
    return batch


def forget_batches(batch: Batch, forgotten_B: Tensor) -> Batch:
    """Return a batch in which some sets have no known batch (code -1)."""
    return batch._replace(batch_BS=torch.where(forgotten_B[:, None], -1, batch.batch_BS))


def blur_features(batch: Batch, noise_BF: Tensor, *, control_code: int) -> Batch:
    """Return a batch with noise on perturbation features, except of control sets."""
    is_perturbed_B1 = (batch.pert_B != control_code)[:, None]
    return batch._replace(pert_BF=batch.pert_BF + noise_BF.to(batch.pert_BF.dtype) * is_perturbed_B1)
