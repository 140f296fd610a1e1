"""One update of the weights: batch, prediction, losses, gradient, clipping and optimiser.

Invariant: nothing here waits for the device. On one GPU with its cells there, a whole update is one CUDA graph, after
some eager updates; everywhere else its operations are launched one by one. Shapes: B sets, K other perturbations.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from pertcast.config import LossConfig, TrainConfig
from pertcast.data.device_cells import has_triton
from pertcast.errors import ConfigError
from pertcast.models.heads import dropouts_of, key_dropout
from pertcast.models.state import Prediction, StateTransition
from pertcast.train.batches import Batch, Codes, Draws, Fetched, SetReader, augment
from pertcast.train.devices import whole
from pertcast.train.loss_targets import TrainingTargets
from pertcast.train.loss_terms import Others, loss_terms, total_loss, warm_up

_EAGER_UPDATES = 3  # Before a graph is captured, so that everything is allocated and tuned
_COMPILED_FROM = 100
"""The step from which an update is compiled on its own account: the first steps do not wait for that."""
_WORTH_COMPILING = 5_000
_STEPS_LATE = 16


class Turn(NamedTuple):
    """Some sets of a step: their numbers, what the host has read for them, and what was drawn."""

    codes: Codes
    fetched: Fetched
    draws: Draws


def make_optimizer(
    model: nn.Module, config: TrainConfig, device: torch.device, *, for_graph: bool = False
) -> torch.optim.Optimizer:
    """Return Adam or AdamW, fused if torch supports it; a CUDA graph can hold its step if asked."""
    make = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    rate: Any = torch.tensor(config.learning_rate, device=device) if for_graph else config.learning_rate
    return make(
        model.parameters(),
        lr=rate,
        weight_decay=config.weight_decay,
        fused=device.type in ("cpu", "cuda"),
        capturable=for_graph,
    )


class Update:
    """Take steps of one network with one optimiser; `note` is told of what cannot be done."""

    def __init__(
        self,
        network: StateTransition,
        reader: SetReader,
        fabric: Fabric,
        configs: tuple[TrainConfig, LossConfig],
        note: Callable[[str], None],
    ) -> None:
        self.network, self._reader, self._fabric, self._note = network, reader, fabric, note
        self._train, self._loss = configs
        self.targets: TrainingTargets | None = None
        self._is_single = fabric.world_size == 1
        self.model: Any
        if self._is_single:
            # Fabric's wrappers convert every input and output, which costs passes over all cells
            self.model = network.to(fabric.device)
        else:
            compiled: Any = torch.compile(network) if self._train.compile is True else network
            self.model = fabric.setup_module(compiled)
        # after the network is set up: its parameters may have become shards
        in_graph = self._is_single and fabric.device.type == "cuda"
        self.optimizer = make_optimizer(network, self._train, fabric.device, for_graph=in_graph)
        self._stepper: Any = self.optimizer if self._is_single else fabric.setup_optimizers(self.optimizer)
        self._parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._dropouts = dropouts_of(network)
        self._share = torch.ones((), device=fabric.device)
        self._loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]] = self._total
        self._is_compiled = False
        self._can_compile = self._is_single
        self._can_capture = not self._obstacle()
        self._num_eager = 0
        self._graph: tuple[Any, Turn, Tensor] | None = None
        self._stream: Any = None
        if self._can_capture:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def _obstacle(self) -> str:
        """Return why a step is not one CUDA graph, or nothing."""
        obstacles = {
            "several devices": not self._is_single,
            f"a {self._fabric.device.type} has no CUDA graphs": self._fabric.device.type != "cuda",
            "cells come from the host": not self._reader.is_resident,
            "train.accumulate is above 1": self._train.accumulate > 1,
            "loss.nb asks for sizes": bool(self._loss.nb),
        }
        return next((name for name, is_there in obstacles.items() if is_there), "")

    @property
    def path(self) -> str:
        """A sentence on how updates run."""
        kind = "fused kernels" if self._compiles_at(self._train.steps) else "eager operations"
        obstacle = self._obstacle()
        return f"steps: {kind}, one by one ({obstacle})" if obstacle else f"steps: one CUDA graph of {kind}"

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Run everything on one stream, on which a graph may be captured."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)

    def take(self, turns: Sequence[Turn], *, step: int, learning_rate: float) -> Tensor:
        """Update the weights; return the loss, its terms (see `names`) and the gradient's norm on the device."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        self._share.fill_(warm_up(self._loss, step))
        self._choose_kernels(step)
        if not self._can_capture or (self._graph is None and self._num_eager < _EAGER_UPDATES):
            self._num_eager += 1
            return self._update(turns)
        return self._replay(turns[0])

    def _compiles_at(self, step: int) -> bool:
        asked = self._train.compile
        if asked == "auto":
            asked = self._fabric.device.type == "cuda" and has_triton() and self._train.steps >= _WORTH_COMPILING
            asked = asked and step >= _COMPILED_FROM
        return asked and self._can_compile

    def _choose_kernels(self, step: int) -> None:
        if self._is_compiled or not self._compiles_at(step):
            return
        self._loss_of = torch.compile(self._total, dynamic=False)
        self._is_compiled, self._graph, self._num_eager = True, None, 0

    def _update(self, turns: Sequence[Turn]) -> Tensor:
        totals: Any = 0
        for number, turn in enumerate(turns):
            batch = augment(
                self._reader.batch(turn.codes.device, turn.fetched), turn.draws, control_code=self._reader.control_code
            )
            key_dropout(self._dropouts, turn.draws.keys_B2)
            with self._waiting(number + 1 < len(turns)):
                totals = totals + self._add_gradient(batch, turn.draws.others_BK, 1 / len(turns))
        totals = totals / len(turns)
        norm = self._clip()
        self._stepper.step()
        self._stepper.zero_grad()
        if not self._is_single:
            totals = self._fabric.all_reduce(totals, reduce_op="mean")
        return torch.cat([totals, norm.to(totals).reshape(1)])

    def _add_gradient(self, batch: Batch, others_BK: Tensor | None, weight: float) -> Tensor:
        """Add to the gradient of a step; return the loss and its terms."""
        try:
            return self._differentiate(batch, others_BK, weight)
        except RuntimeError as error:  # torch's errors of compilation are of this kind; others come again below
            if not self._is_compiled or isinstance(error, torch.OutOfMemoryError):
                raise
            why = f"torch cannot compile network and losses ({_first_line(error)})"
            if self._train.compile is True:
                raise ConfigError(f'[train] compile: {why}; set it to "auto" or false') from error
            self._note(f"steps: eager operations, because {why}")
            self._loss_of, self._is_compiled, self._can_compile = self._total, False, False
            self._stepper.zero_grad()
            return self._differentiate(batch, others_BK, weight)

    def _differentiate(self, batch: Batch, others_BK: Tensor | None, weight: float) -> Tensor:
        loss, terms = self._loss_of(batch, others_BK, self._share)
        if self._is_single:
            (loss * weight).backward()  # type: ignore[no-untyped-call]
        else:
            self._fabric.backward(loss * weight)
        self.names = ["loss", *terms]
        return torch.stack([loss.detach(), *(value.detach() for value in terms.values())])

    def _replay(self, turn: Turn) -> Tensor:
        """Put a turn into the graph's tensors, capture the graph first if there is none, and launch it."""
        if self._graph is None:
            fixed = Turn(
                Codes(turn.codes.host, turn.codes.device.clone()),
                turn.fetched._replace(base_BG=_copy(turn.fetched.base_BG)),
                Draws(*map(_copy, turn.draws)),
            )
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=self._stream):
                    values = self._update([fixed])
            except RuntimeError as error:
                self._note(f"steps: launched one by one, because no CUDA graph can hold them ({_first_line(error)})")
                self._can_capture = False
                self._stepper.zero_grad()
                return self._update([turn])
            self._graph = graph, fixed, values
        graph, fixed, values = self._graph
        fixed.codes.device.copy_(turn.codes.device, non_blocking=True)
        for into, value in zip((*fixed.draws, fixed.fetched.base_BG), (*turn.draws, turn.fetched.base_BG), strict=True):
            if into is not None and value is not None:
                into.copy_(value, non_blocking=True)
        graph.replay()
        return values.clone()

    def terms(self, batch: Batch, others_BK: Tensor | None) -> dict[str, Tensor]:
        """Predict a batch and return the loss terms of each set."""
        if self.targets is None:
            return loss_terms(self.predict(batch), batch, self._loss)
        assert batch.screen_B is not None
        assert others_BK is not None
        targets = self.targets.of(batch.context_B, batch.pert_B, batch.screen_B, batch.measured_BG)
        if self._reader.reads_what_it_predicts:
            # an effect is relative to the set's own controls; others would add sampling noise
            targets = targets._replace(reference_mean_BG=batch.control_BSI.float().mean(1))
        return loss_terms(
            self.predict(batch, targets.reference_mean_BG),
            batch,
            self._loss,
            targets=targets,
            others=Others(self.targets.effects_NG[others_BK.clamp_min(0)], others_BK >= 0),
            positive_weight=self.targets.positive_weight
            if self._loss.de_positive_weight == "balanced"
            else self._loss.de_positive_weight,
            gather=self.gather,
        )

    def predict(self, batch: Batch, *reference: Tensor) -> Prediction:
        """Return the network's prediction at the precision of the training."""
        bf16 = self._is_single and self._train.precision == "bf16"
        with torch.autocast(
            self._fabric.device.type, torch.bfloat16, enabled=bf16, cache_enabled=not self._can_capture
        ):
            prediction: Prediction = self.model(*batch.for_network(), *reference)
        return prediction

    def _total(self, batch: Batch, others_BK: Tensor | None, share: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        terms = {name: value.mean() for name, value in self.terms(batch, others_BK).items()}
        return total_loss(terms, self._loss, share=share), terms

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of every process, without gradient."""
        if self._is_single:
            return rows
        gathered = self._fabric.all_gather(rows.detach().contiguous())
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1)

    def _waiting(self, more: bool) -> AbstractContextManager[Any]:
        """Keep the gradients of this process to itself until the last turn of a step."""
        return nullcontext() if self._is_single else self._fabric.no_backward_sync(self.model, enabled=more)

    def _clip(self) -> Tensor:
        limit = self._train.clip or math.inf
        if self._is_single:
            # as torch's clip_grad_norm_, without its loops over parameters
            gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            torch._foreach_mul_(gradients, (limit / (total + 1e-6)).clamp(max=1.0))
            return total
        norm = self._fabric.clip_gradients(self.model, self._stepper, max_norm=limit, error_if_nonfinite=False)
        return whole(norm) if norm is not None else torch.zeros(())


def _copy(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def steps_late(device: torch.device) -> int:
    """Return how many steps later the numbers of a step are read."""
    return _STEPS_LATE if device.type == "cuda" else 0


class LateValues:
    """Numbers of steps that are read some steps later, so that no step waits for a GPU."""

    def __init__(self, late: int) -> None:
        self._late = late
        self._pending: deque[tuple[int, float, Tensor, Any]] = deque()

    def add(self, step: int, learning_rate: float, values: Tensor) -> None:
        """Have the numbers of a step copied to the host."""
        event = None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._pending.append((step, learning_rate, values, event))

    def read(self, *, everything: bool = False) -> Iterator[tuple[int, float, list[float]]]:
        """Yield steps that are old enough, or all, with their learning rates and numbers."""
        while len(self._pending) > (0 if everything else self._late):
            step, learning_rate, values, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            yield step, learning_rate, values.tolist()
