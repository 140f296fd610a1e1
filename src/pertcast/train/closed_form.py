"""Correct a network's average error on a new cell line in its last bias, and scale its shift, both in closed form.

Invariants: only the line's training cells are read, only that bias changes, and nothing is random. Shapes: K training
targets, B sets, S cells in a set, N cells in all, O predicted genes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pertcast.data.cell_sets import CellSets
from pertcast.models.few_parameters import last_layer
from pertcast.models.state import StateTransition, clipped_effect
from pertcast.train.batches import SetReader
from pertcast.train.training_effects import TrainingEffects

_MOST_CELLS = 2048
_SETS_AT_ONCE = 8
_HALVINGS = 40


def common_share(errors_KO: Tensor) -> float:
    """Return the share of the targets' mean error that also holds for other targets, 0 to 1.

    >>> common_share(torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
    0.8
    """
    errors_KO = errors_KO.double()
    square = float(errors_KO.mean(0).square().sum())
    if len(errors_KO) < 2 or not square:
        return 0.0
    return max(0.0, 1 - float(errors_KO.var(0).sum()) / len(errors_KO) / square)


def offset_of(cells_NO: Tensor, weight_N: Tensor, wanted_O: Tensor) -> Tensor:
    """Return the value to add to each gene so that the mean over cells, clipped at 0, is the wanted one.

    >>> offset_of(torch.tensor([[0.0], [4.0]]), torch.full((2,), 0.5), torch.tensor([1.0])).round(decimals=4)
    tensor([-2.])
    """
    low_O, high_O = -cells_NO.amax(0), wanted_O - cells_NO.amin(0)
    for _ in range(_HALVINGS):
        middle_O = (low_O + high_O) / 2
        is_low_O = weight_N @ (cells_NO + middle_O).clamp_min_(0) < wanted_O
        low_O, high_O = torch.where(is_low_O, middle_O, low_O), torch.where(is_low_O, high_O, middle_O)
    return torch.where(wanted_O > 0, high_O, high_O.clamp_max(0))


class _Errors(NamedTuple):
    """The missing mean of each group (context, perturbation), and cells of its prediction."""

    errors: dict[tuple[int, int], Tensor]  # (context, perturbation) → (O,)
    cells_NO: Tensor  # Predicted cells before values below 0 are cut off, and their weights: each group has the same
    weight_N: Tensor


@torch.no_grad()
def fit_offset(network: StateTransition, reader: SetReader, effects: TrainingEffects) -> float | None:
    """Move the last bias by the network's average error on the line; return :func:`common_share`."""
    found = _measure(network, reader, effects)
    if found is None:
        return None
    control = reader.control_code
    of_controls = {context: error_O for (context, pert), error_O in found.errors.items() if pert == control}
    contexts = sorted({context for context, _ in found.errors})
    nothing_O = torch.zeros(found.cells_NO.shape[1])
    offset_O = torch.stack([of_controls.get(context, nothing_O) for context in contexts]).mean(0)
    beside = [
        error_O - of_controls.get(context, nothing_O)
        for (context, pert), error_O in found.errors.items()
        if pert != control
    ]
    share = common_share(torch.stack(beside)) if beside else 0.0
    if share:
        offset_O = offset_O + share * torch.stack(beside).mean(0)
    if not offset_O.any():
        return share
    mean_O = found.weight_N @ found.cells_NO.clamp_min(0)
    wanted_O = (mean_O + offset_O).clamp_min(0)
    last_layer(network).bias.add_(offset_of(found.cells_NO, found.weight_N, wanted_O))
    return share


def _measure(network: StateTransition, reader: SetReader, effects: TrainingEffects) -> _Errors | None:
    is_shift = reader.spec.shift
    most_sets = max(1, _MOST_CELLS // reader.spec.set_size)
    sets = _in_turn(reader.training(0, control_sets=not is_shift), most_sets)
    if not len(sets):
        return None
    row_of = effects.row_of()
    sums: dict[tuple[int, int], Tensor] = {}
    kept: list[Tensor] = []
    groups = sets.groups
    number = Counter(groups)
    for part, control_BSI, output_BSO in predict_sets(network, reader, sets):
        measured_BO = reader.measured(torch.from_numpy(part.screen).long())
        if is_shift:
            base_BO = torch.zeros(len(part), 1) if reader.base is None else torch.from_numpy(reader.base.fitted(part))
            output_BSO = control_BSI + base_BO[:, None] + output_BSO
        predicted_BO = output_BSO.clamp_min(0).mean(1)
        if is_shift and reader.base is not None:
            predicted_BO = predicted_BO + clipped_effect(control_BSI, base_BO)
        for place, group in enumerate(part.groups):
            # beside these control cells, so that what sets their sample apart from all does not count as an error
            real_O = (
                control_BSI[place].mean(0)
                if reader.reads_what_it_predicts
                else torch.from_numpy(effects.control_mean_SG[part.screen[place]])
            )
            if group[1] != reader.control_code:
                real_O = real_O + torch.from_numpy(effects.effects_NG[row_of[group]])
            # NaN: a gene that was not measured has no error
            error_O = (real_O - predicted_BO[place]).nan_to_num()
            if measured_BO is not None:
                error_O = error_O * measured_BO[place]
            sums[group] = sums.get(group, 0) + error_O / number[group]
        kept.extend(output_BSO[: max(0, most_sets - len(kept))])
    number_kept = Counter(groups[: len(kept)])
    weight_B = torch.tensor([1 / number_kept[group] for group in groups[: len(kept)]])
    cells_NO = torch.cat(kept)
    weight_N = (weight_B / weight_B.sum()).repeat_interleave(reader.spec.set_size) / reader.spec.set_size
    return _Errors(sums, cells_NO, weight_N)


def _in_turn(sets: CellSets, most: int) -> CellSets:
    """Return at most so many sets of each (context, perturbation), all first ones before any second one."""
    seen: dict[tuple[int, int], int] = {}
    turn = []
    for group in sets.groups:
        seen[group] = seen.get(group, 0) + 1
        turn.append(seen[group])
    order: NDArray[np.int64] = np.argsort(turn, kind="stable")
    return sets[order[: np.count_nonzero(np.array(turn) <= most)]]


@torch.no_grad()
def predict_sets(
    network: StateTransition, reader: SetReader, sets: CellSets
) -> Iterator[tuple[CellSets, Tensor, Tensor]]:
    """Yield some sets at a time, their control cells, and the output of the last layer before its ReLU."""
    outputs: list[Tensor] = []
    # a copy, since the network may cut off values below 0 in place
    hook = last_layer(network).register_forward_hook(
        lambda _module, _inputs, output: outputs.append(output.float().clone())
    )
    was_training = network.training
    network.eval()
    try:
        for start in range(0, len(sets), _SETS_AT_ONCE):
            part = sets[start : start + _SETS_AT_ONCE]
            batch = reader.read(part)
            network(*batch.for_network())
            yield part, batch.control_BSI, outputs.pop()
    finally:
        hook.remove()
        network.train(was_training)


def least_squares_gain(shift_PO: Tensor, asked_PO: Tensor) -> float:
    """Return the factor, 0 to 1, by which the shifts are nearest to the wanted ones.

    >>> least_squares_gain(torch.tensor([[2.0], [4.0]]), torch.tensor([[7.0], [8.0]]))
    0.5
    """
    shift_PO, asked_PO = shift_PO.double(), asked_PO.double()
    if len(shift_PO) > 1:
        shift_PO, asked_PO = shift_PO - shift_PO.mean(0), asked_PO - asked_PO.mean(0)
    square = float(shift_PO.square().sum())
    return min(max(float((shift_PO * asked_PO).sum()) / square, 0.0), 1.0) if square else 1.0


@torch.no_grad()
def fit_shift(network: StateTransition, reader: SetReader, effects: TrainingEffects) -> float | None:
    """Fit the scale of the network's shift to the line's training targets; return the gain."""
    size = reader.spec.set_size
    sets = reader.training(0)
    sets = sets[np.flatnonzero(sets.pert != reader.control_code)][: max(1, _MOST_CELLS // size)]
    if not len(sets):
        return None
    _, controls, shifts = zip(*predict_sets(network, reader, sets), strict=True)
    control_BSO, shift_BSO = torch.cat(controls), torch.cat(shifts)
    row_of = effects.row_of()
    row_B = [row_of[group] for group in sets.groups]
    rows, target_B = np.unique(row_B, return_inverse=True)
    weight_PB = torch.from_numpy((target_B == np.arange(len(rows))[:, None]).astype(np.float32))
    weight_PB /= weight_PB.sum(1, keepdim=True)
    effect_PO = torch.from_numpy(effects.effects_NG[rows])
    # a gene that was not measured asks for what the network predicts
    shift_PO = weight_PB @ shift_BSO.mean(1)
    effect_PO = torch.where(effect_PO.isnan(), shift_PO, effect_PO)
    base_BO = torch.zeros(len(sets), 1) if reader.base is None else torch.from_numpy(reader.base.fitted(sets))
    gain = least_squares_gain(shift_PO, effect_PO - weight_PB @ base_BO)
    weight_B = weight_PB.mean(0)
    # beside these control cells, so that what sets their sample apart from all does not count as an effect
    wanted_O = weight_B @ control_BSO.mean(1) + effect_PO.mean(0)
    if reader.base is not None:
        wanted_O -= weight_B @ clipped_effect(control_BSO, base_BO)
    wanted_O.clamp_min_(0)
    cells_NO = (control_BSO + base_BO[:, None] + gain * shift_BSO).flatten(0, 1)
    layer = last_layer(network)
    layer.weight.mul_(gain)
    layer.bias.mul_(gain).add_(offset_of(cells_NO, weight_B.repeat_interleave(size) / size, wanted_O))
    return gain
