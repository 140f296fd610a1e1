"""Predicted cells with a larger or smaller effect on their control cells.

Legend of shapes: S cells, G genes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["amplify", "effect_size"]


def amplify(
    predicted_log1p_SG: NDArray[np.float32],
    control_log1p_SG: NDArray[np.float32],
    amplitude: float,
    *,
    ceiling: float = float("inf"),
) -> NDArray[np.float32]:
    """Return predicted cells whose mean effect is `amplitude` times as large, where that is not below 0; zeros stay 0.

    A gene's values are multiplied by what its mean must become over what it is. One that was predicted to fall and has
    to rise again gets a share of each cell's own control instead, since there may be nothing left to multiply.

    Parameters
    ----------
    predicted_log1p_SG, control_log1p_SG
        Cells of a set, each beside the control cell that it was made from.
    amplitude
        0 gives the controls' mean, 1 the prediction itself, to the bit.
    ceiling
        What no value rises above, unless it was predicted there: log1p of a cell's total is what a gene has that is all
        of the cell. Means fall short by what is cut off.

    Examples
    --------
    >>> amplify(np.array([[0.0, 1.0], [4.0, 1.0]], dtype="f4"), np.array([[1.0, 2.0]] * 2, dtype="f4"), 2.0).tolist()
    [[0.0, 0.0], [6.0, 0.0]]
    """
    if amplitude == 1:
        return predicted_log1p_SG
    control_G = control_log1p_SG.mean(axis=0, dtype=np.float64)
    mean_G = predicted_log1p_SG.mean(axis=0, dtype=np.float64)
    wanted_G = np.maximum(control_G + amplitude * (mean_G - control_G), 0)
    rises_G = (mean_G < wanted_G) & (mean_G < control_G)
    factor_G = np.divide(wanted_G, mean_G, out=np.ones_like(mean_G), where=~rises_G & (mean_G > 0))
    share_G = np.divide(wanted_G - mean_G, control_G, out=np.zeros_like(mean_G), where=rises_G)
    amplified: NDArray[np.float32] = predicted_log1p_SG * factor_G.astype(np.float32)
    if rises_G.any():
        amplified += control_log1p_SG * share_G.astype(np.float32)
    return np.minimum(amplified, np.maximum(predicted_log1p_SG, np.float32(ceiling)))


def effect_size(predicted_log1p_SG: NDArray[np.float32], control_log1p_SG: NDArray[np.float32]) -> float:
    """Return the root mean square over genes of the mean effect.

    Examples
    --------
    >>> effect_size(np.array([[2.0, 2.0]], dtype="f4"), np.zeros((1, 2), dtype="f4"))
    2.0
    """
    effect_G = predicted_log1p_SG.mean(axis=0, dtype=np.float64) - control_log1p_SG.mean(axis=0, dtype=np.float64)
    return float(np.sqrt(np.square(effect_G).mean()))
