"""Baselines: control copy, mean effect, ridge, kernel ridge, nearest neighbours on features; pure array functions."""

from pertcast.models.baselines.fit import Fit, examples_of, fit_baseline
from pertcast.models.baselines.predict import (
    Baseline,
    BaselineKind,
    BaselineSpec,
    Choice,
    Examples,
    open_baseline,
    predict_effects,
    save_baseline,
)

__all__ = [
    "Baseline",
    "BaselineKind",
    "BaselineSpec",
    "Choice",
    "Examples",
    "Fit",
    "examples_of",
    "fit_baseline",
    "open_baseline",
    "predict_effects",
    "save_baseline",
]
