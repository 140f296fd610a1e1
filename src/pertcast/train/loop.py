"""The training loop: batch, prediction, loss, update; validation, checkpoints and interrupts.

Invariant: a step depends only on the seed, its number and the weights. So an interrupted and resumed run ends with the
same bits as an uninterrupted one (on the same devices and number of threads). Every draw is keyed by the number of a
set in its step, so other numbers of devices differ by rounding alone.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from pertcast.config import Experiment
from pertcast.data.de_labels import de_labels
from pertcast.data.features import PertFeatures
from pertcast.data.store import Store
from pertcast.errors import CheckpointError
from pertcast.models.state import StateTransition
from pertcast.progress import Advance, Progress
from pertcast.train.batches import Codes, Fetched, SetReader, SetStream, StreamState, draws_of
from pertcast.train.checkpoints import (
    METRICS,
    MetricsLog,
    TrainState,
    begin_run,
    load_newest,
    optimizer_tensors,
    restore,
    save_state,
)
from pertcast.train.control_counts import ControlRates
from pertcast.train.devices import is_sharded, whole_tensors
from pertcast.train.loss_targets import TrainingTargets, training_targets
from pertcast.train.loss_terms import needs_training_targets, total_loss
from pertcast.train.update import LateValues, Turn, Update, steps_late
from pertcast.train.validation import OfficialMetrics, criterion


@contextmanager
def interrupts() -> Iterator[Callable[[], int]]:
    """Finish the current step on Ctrl-C or SIGTERM; a second signal does not wait."""
    received: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, remember) for number in handled}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_SMOOTHING = 0.9
_LOWEST_SHARE = 0.01


@dataclass(frozen=True)
class TrainingPlan:
    """What a training needs, resolved once from its experiment."""

    experiment: Experiment
    store: Store
    out: Path  # The run's folder
    identity: dict[str, Any]  # The settings that a resumed run must share
    fabric: Fabric  # Devices and precision
    features: PertFeatures
    reader: SetReader  # Where batches come from
    network: StateTransition
    rates: ControlRates | None = None  # For the counts head
    official: OfficialMetrics | None = None  # The official metrics, if they select the best step
    # Whether the initial weights are validated, too, and may stay the best
    validates_first: bool = False


class Loop:
    """One training, resumed from the newest checkpoint of its folder."""

    def __init__(self, plan: TrainingPlan, progress: Progress) -> None:
        self.plan, self.out, self.fabric, self.reader = plan, plan.out, plan.fabric, plan.reader
        self.train, self.loss, self.network = plan.experiment.train, plan.experiment.loss, plan.network
        where = self.reader.place(self.fabric.device, self.train.cells)
        self.update = Update(self.network, self.reader, self.fabric, (self.train, self.loss), progress.note)
        self.model, self.optimizer = self.update.model, self.update.optimizer
        saved, notes = self.fabric.broadcast(load_newest(self.out) if self.fabric.is_global_zero else (None, []))
        # weights of the best validated step, on the CPU; of a sharded network, on the first process alone
        self.best = restore(saved, model=self.network, optimizer=self.optimizer) if saved else None
        self.state: TrainState = saved.state if saved else TrainState()
        self.fabric.barrier()
        self.log: MetricsLog | None = None
        if self.fabric.is_global_zero:
            begin_run(self.out, plan.identity, plan.features, self.reader.base.baseline if self.reader.base else None)
            self.log = MetricsLog(self.out / METRICS, self.state)
        for note in notes:
            progress.note(note)
        progress.note(f"{self.fabric.device}: {where}; {self.update.path}")
        self.val_sets = self.reader.validation()
        if needs_training_targets(self.loss):
            self.update.targets = self._training_targets(progress)
        self._late = LateValues(steps_late(self.fabric.device))
        self._saved_step = -1
        self._is_whole = True
        self._rates: dict[str, float] = {}

    def _training_targets(self, progress: Progress) -> TrainingTargets:
        """Collect effects and labels; the first process computes DE labels, and the others read them."""
        store, genes = self.plan.store, self.reader.output_genes
        if self.loss.de and self.fabric.is_global_zero:
            de_labels(store, progress=progress)
        self.fabric.barrier()
        with_labels = bool(self.loss.de)
        targets = training_targets(store, genes, labels=with_labels, rates=self.plan.rates, progress=progress)
        return targets.to(self.fabric.device)

    def take_steps(self, task: str, progress: Progress) -> None:
        """Run to the last step with progress, if anything trains; tell how to resume after Ctrl-C."""
        try:
            if any(parameter.requires_grad for parameter in self.network.parameters()):
                with progress.task(task, self.train.steps, "steps", done=self.state.step) as advance:
                    self.run(advance)
        except (KeyboardInterrupt, SystemExit):
            progress.note(f"stopped at step {self.state.step:,}; run the same command again to resume")
            raise
        finally:
            if self.log is not None:
                self.log.close()

    def run(self, advance: Advance) -> None:
        """Train until the last step or until validation has not improved for `patience` times."""
        self._saved_step = self.state.step
        place = StreamState(self.state.epoch, self.state.offset)
        stream = SetStream(self.reader.training, place, self.reader.codes_device)
        batches = self.reader.batches(self._pieces(stream))
        with closing(batches), interrupts() as interrupted, self.update.on_stream():  # type: ignore[type-var]
            try:
                while True:
                    if self._is_validation_due():
                        self._validate(advance)
                    if self._is_over() or self.state.step % self.train.checkpoint_every == 0:
                        self._checkpoint()
                    if self._is_over():
                        return
                    if signal_number := self._agreed(interrupted()):
                        self._checkpoint()
                        raise KeyboardInterrupt if signal_number == signal.SIGINT else SystemExit(128 + signal_number)
                    self._step(batches, advance)
            except KeyboardInterrupt:
                # An interrupt without a signal, as from a progress bar; never between half-updated weights.
                # One process alone cannot put a sharded network together.
                if self._is_whole and not is_sharded(self.fabric):
                    self._checkpoint()
                raise

    def _is_validation_due(self) -> bool:
        step = self.state.step
        at_step = step == self.train.steps or step % self.train.val_every == 0
        begun = step > 0 or self.plan.validates_first
        return bool(len(self.val_sets)) and begun and at_step and self.state.validated < step

    def _is_over(self) -> bool:
        worse = self.train.patience and self.state.num_worse >= self.train.patience
        return bool(worse) or self.state.step >= self.train.steps

    def _checkpoint(self) -> None:
        self._read_values(everything=True)  # a step that has diverged is not saved
        if self.state.step == self._saved_step:
            return
        weights = self._weights()
        optimizer_state = optimizer_tensors(self.network, self.optimizer)
        optimizer_state = whole_tensors(optimizer_state, keep=self.fabric.is_global_zero)
        if self.fabric.is_global_zero:
            save_state(self.out, self.state, weights=weights, optimizer_state=optimizer_state, best=self.best)
        self._saved_step = self.state.step

    def _weights(self, *, copy: bool = False) -> dict[str, Tensor]:
        """Return the gathered weights; of a sharded network on the first process alone, but all must call it."""
        keep = self.fabric.is_global_zero or not is_sharded(self.fabric)
        return whole_tensors(self.network.state_dict(), keep=keep, copy=copy)

    def kept_weights(self) -> dict[str, Tensor]:
        """Return the weights of the best validated step, or else the last ones."""
        return self.best if self.best is not None else self._weights()

    def _pieces(self, stream: SetStream) -> Iterator[tuple[Codes, StreamState]]:
        while True:
            sets, place = stream.take(self.train.sets_per_step)
            yield sets[self.fabric.global_rank :: self.fabric.world_size], place

    def _places(self, first: int, num: int) -> list[int]:
        """Return the positions in their step of this process's sets."""
        size = self.fabric.world_size
        return [first + self.fabric.global_rank + size * number for number in range(num)]

    def _agreed(self, signal_number: int) -> int:
        """Return the signal that any process has received, or 0, so that all stop after the same step."""
        if self.fabric.world_size == 1:
            return signal_number
        return int(self.update.gather(torch.tensor([signal_number], device=self.fabric.device)).max())

    def _step(self, batches: Iterator[tuple[Codes, Fetched, StreamState]], advance: Advance) -> None:
        started, step = time.perf_counter(), self.state.step
        turns, place = [], StreamState(self.state.epoch, self.state.offset)
        for turn in range(self.train.accumulate):
            codes, fetched, place = next(batches)
            keys = [("train", step, number) for number in self._places(turn * self.train.sets_per_step, len(codes))]
            draws = draws_of(self.reader, self.train, keys)._replace(others_BK=self._others(codes, keys))
            turns.append(Turn(codes, fetched, draws.to(self.fabric.device)))
        learning_rate = self._learning_rate(step)
        self._is_whole = False
        values = self.update.take(turns, step=step, learning_rate=learning_rate)
        self._late.add(step + 1, learning_rate, values)
        self.state.step, self.state.epoch, self.state.offset = step + 1, *place
        self._is_whole = True
        self._read_values()
        seconds = max(time.perf_counter() - started, 1e-9)
        rate = self._smooth("rate", self.train.sets_per_step * self.train.accumulate / seconds)
        advance(1, detail=f"loss {self._rates.get('loss', math.nan):.4g} · {rate:.3g} sets/s")

    def _others(self, codes: Codes, keys: Sequence[tuple[str | int, ...]]) -> Tensor | None:
        """Draw the perturbations to rank each set against; its key draws them."""
        if self.update.targets is None:
            return None
        num = self.loss.rank_negatives if self.loss.rank else 0
        return self.update.targets.draw_others(codes.groups, num=num, seed=self.train.seed, keys=keys)

    def _read_values(self, *, everything: bool = False) -> None:
        """Log the numbers of steps that are old enough, or of all; raise if one is not finite."""
        for step, learning_rate, numbers in self._late.read(everything=everything):
            values = dict(zip((*self.update.names, "grad_norm"), numbers, strict=True))
            self._require_numbers(step, values)
            self._write("train", step, {**values, "learning_rate": learning_rate})
            self._smooth("loss", values["loss"])

    def _learning_rate(self, step: int) -> float:
        """Return the learning rate of a step: a linear warm-up and an optional linear decay."""
        share = min(1.0, (step + 1) / self.train.warmup_steps) if self.train.warmup_steps else 1.0
        if self.train.decay_steps:
            share *= max(_LOWEST_SHARE, 1 - step / self.train.decay_steps)
        return self.train.learning_rate * share

    def _require_numbers(self, step: int, values: Mapping[str, float]) -> None:
        wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            kept = f"the checkpoint of step {self._saved_step} is kept" if self._saved_step else "no checkpoint yet"
            raise CheckpointError(
                f"{self.out}, step {step}: {', '.join(wrong)}: training has diverged ({kept}); lower "
                "train.learning_rate, lengthen train.warmup_steps or set train.clip, with another --out"
            )

    def _validate(self, advance: Advance) -> None:
        """Measure the validation sets without dropout, and keep the weights if they are the best so far."""
        self._read_values(everything=True)
        sums: dict[str, Tensor] = {}
        self.model.eval()
        with closing(self.reader.batches(self._val_pieces())) as batches, torch.no_grad():  # type: ignore[type-var]
            for codes, fetched, (_, first) in batches:
                num_real = len(self._own_numbers(first))
                keys = [("val", place) for place in self._places(first, len(codes))]
                batch = self.reader.batch(codes.device, fetched)
                # A set that only fills in is called one of control cells, which is no rival to others.
                is_real_B = torch.arange(len(codes), device=batch.pert_B.device) < num_real
                batch = batch._replace(pert_B=torch.where(is_real_B, batch.pert_B, self.reader.control_code))
                others_BK = self._others(codes, keys)
                found = self.update.terms(batch, None if others_BK is None else others_BK.to(self.fabric.device))
                terms = {name: value[:num_real].sum() for name, value in found.items()}
                for name, value in {"loss": total_loss(terms, self.loss), **terms}.items():
                    sums[name] = sums.get(name, 0) + value
                advance(0, detail=f"validating, {first:,} of {len(self.val_sets):,} sets")
        values = {name: value / len(self.val_sets) for name, value in self._reduce(sums, "sum").items()}
        self._require_numbers(self.state.step, values)
        if self.plan.official is not None:
            values |= self.plan.official.measure(self.update.predict, self.fabric)
        self.model.train()
        self._write("val", self.state.step, values)
        state = self.state
        measured = criterion(values, "loss" if self.plan.official is None else self.train.select_by)
        state.validated = state.step
        if measured < state.best_value:
            state.best_loss, state.best_value, state.num_worse = values["loss"], measured, 0
            state.best_step = state.step
            self.best = self._weights(copy=True)
        else:
            state.num_worse += 1

    def _own_numbers(self, first: int) -> range:
        """Return the numbers of this process's validation sets in the batch that starts at `first`."""
        stop = min(first + self.train.sets_per_step, len(self.val_sets))
        return range(first + self.fabric.global_rank, stop, self.fabric.world_size)

    def _val_pieces(self) -> Iterator[tuple[Codes, StreamState]]:
        """Yield this process's share of each batch; a short share is padded with the batch's first set."""
        codes, num, step = self.reader.codes(self.val_sets), len(self.val_sets), self.train.sets_per_step
        for first in range(0, num, step):
            longest = -(-min(step, num - first) // self.fabric.world_size)
            numbers = [*self._own_numbers(first), first][:longest]
            yield codes[np.array(numbers)], StreamState(0, first)

    def _reduce(self, values: Mapping[str, Tensor], how: str) -> dict[str, float]:
        """Return sums or means over all processes, in one exchange."""
        reduced = self.fabric.all_reduce(torch.stack([value.float() for value in values.values()]), reduce_op=how)
        assert isinstance(reduced, Tensor)
        return dict(zip(values, reduced.tolist(), strict=True))

    def _write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        if self.log is not None:
            self.log.write(kind, step, values)
        if self.fabric.loggers:
            named = {f"{kind}/{name}": value for name, value in values.items()}
            self.fabric.log_dict(named, step=step)

    def _smooth(self, name: str, value: float) -> float:
        before = self._rates.get(name, value)
        self._rates[name] = _SMOOTHING * before + (1 - _SMOOTHING) * value
        return self._rates[name]
