"""What a fitted baseline was fitted on, found again from the baseline itself: its old store need not be at hand.

Shapes: N examples, C contexts, F width of a feature, G genes.
"""

from __future__ import annotations

import numpy as np

from pertcast.models.baselines.predict import Baseline, Examples, kernel

__all__ = ["examples_of"]


def examples_of(baseline: Baseline) -> Examples:
    """Return examples on which the same baseline comes out, but for rounding.

    Ridge and kernel ridge: ``effect = (K + penalty) weight + mean of the context``; nearest neighbours: ``weight +
    mean``. A mean effect keeps no examples: one for each context, of the context's mean, stands for them. Contexts
    without examples, whose mean is that of all, have none here either.

    Examples
    --------
    >>> from pertcast.models.baselines.fit import fit_baseline
    >>> given = Examples(np.zeros(2, np.int64), np.eye(2), np.array([[1.0], [3.0]]), 1)
    >>> examples_of(fit_baseline("mean", given).baseline).effect_NG.tolist()
    [[2.0]]
    """
    spec, mean_CG = baseline.spec, baseline.mean_CG.astype(np.float64)
    if spec.kind in ("control", "mean"):
        # a context without examples has the last row's mean; where all have, they are one context's, and any will do
        own_C = np.flatnonzero((mean_CG[:-1] != mean_CG[-1]).any(axis=1))
        context_N = own_C if len(own_C) else np.zeros(1, dtype=np.int64)
        return Examples(context_N, np.zeros((len(context_N), spec.pert_dim)), mean_CG[context_N], spec.num_contexts)
    context_N, feature_NF = baseline.context_N, baseline.feature_NF.astype(np.float64)
    weight_NG = baseline.weight_NG.astype(np.float64)
    effect_NG = weight_NG + mean_CG[context_N]
    if spec.kind != "knn":
        same_NN = context_N[:, None] == context_N
        kernel_NN = kernel(spec.kind, feature_NF, feature_NF, spec.choice) * np.where(same_NN, 1.0, spec.choice.sharing)
        effect_NG = kernel_NN @ weight_NG + spec.choice.penalty * weight_NG + mean_CG[context_N]
    return Examples(context_N, feature_NF, effect_NG, spec.num_contexts)
