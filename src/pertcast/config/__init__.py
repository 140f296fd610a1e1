"""Every knob: one frozen, validated section per stage; TOML in, TOML out; unknown keys are errors."""

from pertcast.config.learning import AdaptConfig, LossConfig, ModelConfig, TrainConfig
from pertcast.config.load import load_experiment, rebuild_experiment, upgrade
from pertcast.config.rungs import RUNGS, model_overrides, rung_of, rung_overrides
from pertcast.config.sections import (
    ColumnsConfig,
    Experiment,
    FeaturesConfig,
    FewshotConfig,
    GenerateConfig,
    PrepareConfig,
    SubmissionConfig,
)
from pertcast.config.uses import STORE_KEYS, differences, value_at

__all__ = [
    "RUNGS",
    "STORE_KEYS",
    "AdaptConfig",
    "ColumnsConfig",
    "Experiment",
    "FeaturesConfig",
    "FewshotConfig",
    "GenerateConfig",
    "LossConfig",
    "ModelConfig",
    "PrepareConfig",
    "SubmissionConfig",
    "TrainConfig",
    "differences",
    "load_experiment",
    "model_overrides",
    "rebuild_experiment",
    "rung_of",
    "rung_overrides",
    "upgrade",
    "value_at",
]
