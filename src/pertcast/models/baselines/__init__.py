"""Baselines: control copy, mean effect, ridge, kernel ridge, nearest neighbours on features; pure array functions."""

from pertcast.models.baselines.files import open_baseline, save_baseline
from pertcast.models.baselines.fit import Fit, fit_baseline
from pertcast.models.baselines.predict import Baseline, BaselineKind, BaselineSpec, Choice, Examples, predict_effects
from pertcast.models.baselines.recover import examples_of

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
