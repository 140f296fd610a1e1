"""A network for prediction alone: the same values, but for rounding, with less arithmetic.

What only control cells pass through is computed once for each of them, whatever the number of targets: its code. Two
linear layers of the head with nothing between them are one. On a CPU, oneDNN multiplies: it is faster than torch's own
choice at the same precision.

Shapes: B sets, S cells in a set, C cells, I input width, F width of a perturbation feature, H hidden, D width of the
bottleneck, O output width, G genes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pertcast.models.state import Prediction, StateTransition


class FoldedNetwork:
    """A network that only predicts; it takes over the layers that it is made of."""

    def __init__(self, network: StateTransition) -> None:
        spec = network.spec
        self._network = network.eval().requires_grad_(False)
        self.needs_controls = spec.shift
        self._down: nn.Module | None = None
        self.code_width = spec.hidden
        if network.final_down_then_up is not None:
            down, *others = network.final_down_then_up
            first = network.project_out[-1]
            assert isinstance(down, nn.Linear)
            assert isinstance(first, nn.Linear)
            network.project_out[-1] = _product(down, first)
            network.final_down_then_up = nn.Sequential(*others)
            if spec.residual:
                self.code_width += down.out_features
                self._down = _on_onednn(_without_bias(down))
        for module in list(network.modules()):
            for name, layer in module.named_children():
                setattr(module, name, _on_onednn(layer))

    @torch.inference_mode()
    def encode(self, control_CI: Tensor) -> Tensor:
        """Return the codes of control cells, (C, H) or (C, H + D)."""
        basal_CH = self._network.basal_encoder(control_CI)
        return basal_CH if self._down is None else torch.cat([basal_CH, self._down(control_CI)], -1)

    @torch.inference_mode()
    def predict(
        self,
        code_BSH: Tensor,
        pert_BF: Tensor,
        batch_BS: Tensor,
        context_B: Tensor,
        *,
        base_BG: Tensor | None = None,
        control_BSI: Tensor | None = None,
    ) -> Prediction:
        """Predict perturbed cells from the codes of control cells; a shift needs the cells themselves, too."""
        network = self._network
        basal_BSH, down_BSD = code_BSH[..., : network.spec.hidden], code_BSH[..., network.spec.hidden :]
        hidden_BSH, confidence_B = network.attend(basal_BSH, pert_BF, batch_BS, context_B)
        if network.spec.residual and network.final_down_then_up is None:
            hidden_BSH = hidden_BSH + basal_BSH
        output_BSO = network.project_out(hidden_BSH)
        if network.final_down_then_up is not None:
            output_BSO = network.final_down_then_up(output_BSO if self._down is None else output_BSO + down_BSD)
        return network.finish(output_BSO, hidden_BSH, confidence_B, pert_BF, control_BSI, base_BG)


def _product(second: nn.Linear, first: nn.Linear) -> nn.Linear:
    """Return the layer that does what two layers do one after the other."""
    return _layer(second.weight @ first.weight, second(first.bias))


def _without_bias(layer: nn.Linear) -> nn.Linear:
    return _layer(layer.weight, None)


def _layer(weight_OI: Tensor, bias_O: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=bias_O is not None, device="meta")
    layer.load_state_dict({"weight": weight_OI} | ({} if bias_O is None else {"bias": bias_O}), assign=True)
    return layer.requires_grad_(False)


def _on_onednn(layer: nn.Module) -> nn.Module:
    """Return a linear layer of a CPU as one that oneDNN computes; any other layer is returned as it is."""
    if not isinstance(layer, nn.Linear) or layer.weight.device.type != "cpu":
        return layer
    return _OneDnnLinear(layer) if hasattr(torch.ops.mkldnn, "_linear_pointwise") else layer


class _OneDnnLinear(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, values: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(values, self.weight, self.bias, "none", [], "")
        return product
