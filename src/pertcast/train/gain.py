"""A network's shift, fitted to a new line by least squares: how much of it the line asks for, and what is added to all.

Invariant: only the line's training cells are read, and of the network the last layer alone changes.
Shapes: P training targets, B sets, S cells in a set, N cells in all, O predicted genes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pertcast.models.adapt import last_layer
from pertcast.models.state import StateTransition, cut_of
from pertcast.train.batches import SetReader
from pertcast.train.effects import TrainingEffects
from pertcast.train.offset import offset_of, predict_sets

__all__ = ["fit_shift", "least_squares_gain"]

_MOST_CELLS = 2048


def least_squares_gain(shift_PO: Tensor, asked_PO: Tensor) -> float:
    """Return what the shifts should be multiplied by to be nearest to those asked for, 0 to 1.

    Of several targets only what differs between them is looked at: what all have in common is the offset's.

    Parameters
    ----------
    shift_PO
        What the network adds to the mean of each target's cells.
    asked_PO
        What would have to be added.

    Examples
    --------
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
    """Fit what a network adds to control cells to the line's training targets; return the gain.

    The last layer is multiplied by one number, and its bias moved so that the mean effect predicted of the training
    targets is their real one. With a gain of 0 that is the mean effect of these targets; what the network knows of how
    targets differ comes to it as far as theirs do so. Nothing is done, and ``None`` returned, without training targets.

    Parameters
    ----------
    network
        One that predicts a shift, with its weights, on the CPU.
    reader
        Of the line's store; with the baseline that the network will stand on, if it does.
    effects
        Of the line's training split.
    """
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
        wanted_O -= weight_B @ cut_of(control_BSO, base_BO)
    wanted_O.clamp_min_(0)
    cells_NO = (control_BSO + base_BO[:, None] + gain * shift_BSO).flatten(0, 1)
    layer = last_layer(network)
    layer.weight.mul_(gain)
    layer.bias.mul_(gain).add_(offset_of(cells_NO, weight_B.repeat_interleave(size) / size, wanted_O))
    return gain
