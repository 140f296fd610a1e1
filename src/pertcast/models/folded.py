"""A network on all genes with what is linear between its wide layers put together, for prediction.

Networks of arc-state on all genes give their output plus the control cell through two more layers, an eighth as wide
between them. Down there, the output's last layer and the first of the two are one product; and what control cells
contribute hangs on no perturbation: a cell that stands in for many targets is encoded once.

Shapes: N control cells, B sets, S cells in a set, I genes, H hidden, W the narrow width, E = H + W.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pertcast.models.linear import Linear, times_transposed
from pertcast.models.spec import StateSpec
from pertcast.models.state import StateTransition

__all__ = ["FoldedNetwork", "can_fold"]


def can_fold(spec: StateSpec) -> bool:
    """Return whether a network is of this form."""
    return spec.bottleneck and spec.residual and not spec.shift and spec.output_space != "latent"


class FoldedNetwork:
    """Predicts what a network predicts, up to float32's rounding, from control cells that are encoded beforehand.

    Parameters
    ----------
    network
        For which :func:`can_fold` holds, in evaluation mode; it is kept, and must not change any more.
    """

    def __init__(self, network: StateTransition) -> None:
        last, bottleneck = network.project_out[-1], network.final_down_then_up
        assert isinstance(last, Linear)
        assert bottleneck is not None
        down = bottleneck[0]
        assert isinstance(down, Linear)
        self._network, self._before, self._after = network, network.project_out[:-1], bottleneck[1:]
        self._down_WI = down.weight
        self._weight_WH = times_transposed(down.weight, last.weight.t())
        self._bias_W = down.weight @ last.bias + down.bias

    @property
    def width(self) -> int:
        """E, the numbers that stand for a control cell."""
        return self._network.spec.hidden + len(self._down_WI)

    @torch.inference_mode()
    def encode(self, control_NI: Tensor) -> Tensor:
        """Return what the network needs of control cells, float32 (N, E)."""
        return torch.cat([self._network.basal_encoder(control_NI), times_transposed(control_NI, self._down_WI)], dim=-1)

    @torch.inference_mode()
    def predict(
        self, encoded_BSE: Tensor, pert_BF: Tensor, batch_BS: Tensor | None, context_B: Tensor | None
    ) -> Tensor:
        """Return log1p values, (B, S, I); the arguments are the network's own but for the control cells."""
        hidden = self._network.spec.hidden
        hidden_BSH, _ = self._network.attend(encoded_BSE[..., :hidden], pert_BF, batch_BS, context_B)
        narrow_BSW = functional.linear(self._before(hidden_BSH), self._weight_WH, self._bias_W)
        return functional.relu(self._after(narrow_BSW + encoded_BSE[..., hidden:]), inplace=True)
