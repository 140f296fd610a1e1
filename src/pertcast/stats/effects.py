"""Effects of perturbations on the mean: how large, and how well two of them agree.

An effect is mean log1p of perturbed cells minus mean log1p of control cells, a vector over genes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["EffectAgreement", "compare_effects", "knockdown"]


class EffectAgreement(NamedTuple):
    """How a predicted effect agrees with a measured one.

    Attributes
    ----------
    predicted_size, measured_size
        L2 norms over genes.
    correlation
        Pearson correlation over genes; NaN where one of the two is constant.
    """

    predicted_size: float
    measured_size: float
    correlation: float


def compare_effects(predicted_G: NDArray[np.floating], measured_G: NDArray[np.floating]) -> EffectAgreement:
    """Compare two effects over the same genes.

    Parameters
    ----------
    predicted_G, measured_G
        (genes,) differences of mean log1p values.

    Examples
    --------
    >>> compare_effects(np.array([3.0, 4.0]), np.array([3.0, 4.0]))
    EffectAgreement(predicted_size=5.0, measured_size=5.0, correlation=1.0)
    """
    predicted, measured = predicted_G.astype(np.float64), measured_G.astype(np.float64)
    sizes = float(np.linalg.norm(predicted)), float(np.linalg.norm(measured))
    predicted, measured = predicted - predicted.mean(), measured - measured.mean()
    scale = np.linalg.norm(predicted) * np.linalg.norm(measured)
    return EffectAgreement(*sizes, round(float(predicted @ measured / scale), 12) if scale > 0 else float("nan"))


def knockdown(perturbed_log1p: float, control_log1p: float) -> float:
    """Return the share of a gene's expression that is left, from mean log1p values: expm1 over expm1.

    Examples
    --------
    >>> round(knockdown(np.log1p(1.0), np.log1p(10.0)), 3)
    0.1
    """
    return float(np.expm1(perturbed_log1p) / np.expm1(control_log1p)) if control_log1p > 0 else float("nan")
