"""The loop: take a batch, predict, measure, update; validate and keep the best; write checkpoints.

Invariant: what a step does depends on the seed, the step's number and the weights alone, so a run that was stopped
after any step, and one that never was, end with the same bits (on the same device and number of threads).
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from pertcast.config import LossConfig, TrainConfig
from pertcast.data.sets import CellSets
from pertcast.errors import CheckpointError
from pertcast.progress import Advance
from pertcast.stats.draws import key_hash
from pertcast.train.batches import Batch, Place, SetReader, SetStream, read_ahead
from pertcast.train.resume import MetricsLog, Position, save_state
from pertcast.train.terms import loss_terms, total_loss
from pertcast.train.truth import Truth

__all__ = ["Loop", "make_optimizer"]

_SMOOTHING = 0.9


def make_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """Return Adam or AdamW, fused where torch has it."""
    make = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    fused = device.type in ("cpu", "cuda")
    return make(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused)


@dataclass
class Loop:
    """One training, from where `position` stands.

    Attributes
    ----------
    out
        The run's folder.
    fabric
        Devices and precision.
    network, model
        The network itself, and as Fabric wraps it.
    optimizer, stepper
        The optimiser itself, and as Fabric wraps it.
    reader
        Where batches come from.
    train, loss
        The two sections of the experiment.
    position
        Where training stands; updated after each step.
    best
        Weights of the best validated step, on the CPU.
    val_sets
        The sets that validate; none if empty.
    log
        metrics.jsonl, on the first process alone.
    truth
        Effects and labels of the training split, where a term needs them.
    validates_first
        Whether the weights that training starts with are validated, too, and may stay the best.
    """

    out: Path
    fabric: Fabric
    network: nn.Module
    model: Any
    optimizer: torch.optim.Optimizer
    stepper: Any
    reader: SetReader
    train: TrainConfig
    loss: LossConfig
    position: Position
    best: dict[str, Tensor] | None
    val_sets: CellSets
    log: MetricsLog | None
    truth: Truth | None = None
    validates_first: bool = False
    _saved_step: int = -1
    _is_whole: bool = True
    _rates: dict[str, float] = field(default_factory=dict)

    def run(self, advance: Advance) -> None:
        """Train until the last step or until validation has not improved for `patience` times.

        Raises
        ------
        CheckpointError
            If the loss or its gradient is no number; the last checkpoint stays.
        KeyboardInterrupt
            After a checkpoint of the last finished step.
        """
        self._saved_step = self.position.step
        stream = SetStream(self.reader.training, Place(self.position.epoch, self.position.offset))
        batches = read_ahead(self._pieces(stream), self.reader.read)
        with closing(batches), _interrupts() as interrupted:  # type: ignore[type-var]
            try:
                while True:
                    if self._is_validation_due():
                        self._validate(advance)
                    if self._is_over() or self.position.step % self.train.checkpoint_every == 0:
                        self._checkpoint()
                    if self._is_over():
                        return
                    if signal_number := interrupted():
                        self._checkpoint()
                        raise KeyboardInterrupt if signal_number == signal.SIGINT else SystemExit(128 + signal_number)
                    self._step(batches, advance)
            except KeyboardInterrupt:
                # One that came from elsewhere than a signal (a progress bar); never between half-updated weights.
                if self._is_whole:
                    self._checkpoint()
                raise

    def _is_validation_due(self) -> bool:
        step = self.position.step
        at_step = step == self.train.steps or step % self.train.val_every == 0
        begun = step > 0 or self.validates_first
        return bool(len(self.val_sets)) and begun and at_step and self.position.validated < step

    def _is_over(self) -> bool:
        worse = self.train.patience and self.position.num_worse >= self.train.patience
        return bool(worse) or self.position.step >= self.train.steps

    def _checkpoint(self) -> None:
        if self.position.step == self._saved_step:
            return
        if self.fabric.is_global_zero:
            save_state(self.out, self.position, model=self.network, optimizer=self.optimizer, best=self.best)
        self.fabric.barrier()
        self._saved_step = self.position.step

    def _pieces(self, stream: SetStream) -> Iterator[tuple[CellSets, Place]]:
        while True:
            sets, place = stream.take(self.train.sets_per_step)
            yield self._own(sets), place

    def _own(self, sets: CellSets) -> CellSets:
        """Return this process's share of some sets."""
        return sets[self.fabric.global_rank :: self.fabric.world_size]

    def _step(self, batches: Iterator[tuple[Batch, Place]], advance: Advance) -> None:
        started = time.perf_counter()
        step, place = self.position.step, Place(self.position.epoch, self.position.offset)
        learning_rate = self._set_learning_rate(step)
        totals: dict[str, Tensor] = {}
        with self._own_dropout(step):
            for turn in range(self.train.accumulate):
                batch, place = next(batches)
                with self.fabric.no_backward_sync(self.model, enabled=turn + 1 < self.train.accumulate):
                    terms = self._terms(batch, "train", step, turn)
                    loss = total_loss(terms, self.loss, step=step)
                    self.fabric.backward(loss / self.train.accumulate)
                for name, value in {"loss": loss, **terms}.items():
                    totals[name] = totals.get(name, 0) + value.detach() / self.train.accumulate
        norm = self._clip()
        values = {name: self._reduce(value, "mean") for name, value in totals.items()}
        values["grad_norm"] = float(norm)
        self._require_numbers(step + 1, values)
        self._is_whole = False
        self.stepper.step()
        self.stepper.zero_grad()
        self.position.step, self.position.epoch, self.position.offset = step + 1, *place
        seconds = max(time.perf_counter() - started, 1e-9)
        rate = self.train.sets_per_step * self.train.accumulate / seconds
        self._write("train", {**values, "learning_rate": learning_rate})
        self._is_whole = True
        loss_now, rate_now = self._smooth("loss", values["loss"]), self._smooth("rate", rate)
        advance(1, detail=f"loss {loss_now:.4g} · {rate_now:.3g} sets/s")

    def _terms(self, batch: Batch, *key: str | int) -> dict[str, Tensor]:
        """Predict a batch and measure it; the key decides which other perturbations a set is compared with."""
        if self.truth is None:
            batch = self.fabric.to_device(batch)
            prediction = self.model(batch.control_BSI, batch.pert_BF, batch.batch_BS, batch.context_B)
            return loss_terms(prediction, batch, self.loss)
        others_BK = self.truth.draw_others(
            batch.context_B,
            batch.pert_B,
            num=self.loss.rank_negatives if self.loss.rank else 0,
            seed=self.train.seed,
            key=(*key, self.fabric.global_rank),
        )
        batch, others_BK = self.fabric.to_device(batch), self.fabric.to_device(others_BK)
        known = self.truth.of(batch.context_B, batch.pert_B)
        prediction = self.model(
            batch.control_BSI, batch.pert_BF, batch.batch_BS, batch.context_B, known.control_mean_BG
        )
        return loss_terms(
            prediction,
            batch,
            self.loss,
            known=known,
            others_BKG=self.truth.effects_NG[others_BK.clamp_min(0)],
            others_exist_BK=others_BK >= 0,
            positive_weight=self.truth.positive_weight
            if self.loss.de_positive_weight == "balanced"
            else self.loss.de_positive_weight,
        )

    def _set_learning_rate(self, step: int) -> float:
        """Set and return the learning rate of a step: a linear rise over the warm-up, then level."""
        share = min(1.0, (step + 1) / self.train.warmup_steps) if self.train.warmup_steps else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.train.learning_rate * share
        return self.train.learning_rate * share

    @contextmanager
    def _own_dropout(self, step: int) -> Iterator[None]:
        """Key dropout by the step: it draws from torch's global generator alone, so that one is forked and seeded."""
        device = self.fabric.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(key_hash(self.train.seed, "dropout", step, self.fabric.global_rank) % 2**63)
            yield

    def _clip(self) -> Tensor:
        limit = self.train.clip or math.inf
        norm = self.fabric.clip_gradients(self.model, self.stepper, max_norm=limit, error_if_nonfinite=False)
        return norm if norm is not None else torch.zeros(())

    def _require_numbers(self, step: int, values: Mapping[str, float]) -> None:
        wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            kept = f"the checkpoint of step {self._saved_step} is kept" if self._saved_step else "no checkpoint yet"
            raise CheckpointError(
                f"{self.out}, step {step}: {', '.join(wrong)}: training has diverged ({kept}); lower "
                "train.learning_rate, lengthen train.warmup_steps or set train.clip, with another --out"
            )

    def _validate(self, advance: Advance) -> None:
        """Measure the validation sets without dropout; keep the weights if they are the best so far."""
        own = self._own(self.val_sets)
        size = max(1, self.train.sets_per_step // self.fabric.world_size)
        pieces = ((own[start : start + size], Place(0, start)) for start in range(0, len(own), size))
        sums: dict[str, Tensor] = {}
        self.model.eval()
        with closing(read_ahead(pieces, self.reader.read)) as batches, torch.no_grad():  # type: ignore[type-var]
            for batch, place in batches:
                terms = self._terms(batch, "val", place.offset)
                for name, value in {"loss": total_loss(terms, self.loss, step=None), **terms}.items():
                    sums[name] = sums.get(name, 0) + value * len(batch.context_B)
                advance(0, detail=f"validating, {place.offset:,} of {len(own):,} sets")
        self.model.train()
        values = {name: self._reduce(value, "sum") / len(self.val_sets) for name, value in sums.items()}
        self._require_numbers(self.position.step, values)
        self._write("val", values)
        position = self.position
        position.validated = position.step
        if values["loss"] < position.best_loss:
            position.best_loss, position.best_step, position.num_worse = values["loss"], position.step, 0
            self.best = {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}
        else:
            position.num_worse += 1

    def _reduce(self, value: Tensor, how: str) -> float:
        reduced = self.fabric.all_reduce(value, reduce_op=how)
        assert isinstance(reduced, Tensor)
        return reduced.item()

    def _write(self, kind: str, values: Mapping[str, float]) -> None:
        if self.log is not None:
            self.log.write(kind, self.position.step, values)
        if self.fabric.loggers:
            named = {f"{kind}/{name}": value for name, value in values.items()}
            self.fabric.log_dict(named, step=self.position.step)

    def _smooth(self, name: str, value: float) -> float:
        before = self._rates.get(name, value)
        self._rates[name] = _SMOOTHING * before + (1 - _SMOOTHING) * value
        return self._rates[name]


@contextmanager
def _interrupts() -> Iterator[Callable[[], int]]:
    """Let Ctrl-C and SIGTERM wait for the end of the step; a second one does not wait.

    Only within training, and only where Python lets signals be handled (its main thread).
    """
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
