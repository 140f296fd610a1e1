"""Every knob: one frozen, validated section per stage; TOML in, TOML out; unknown keys are errors."""

from pertcast.config.load import load_experiment, rebuild_experiment
from pertcast.config.sections import (
    ColumnsConfig,
    Experiment,
    FeaturesConfig,
    FewshotConfig,
    GenerateConfig,
    LossConfig,
    ModelConfig,
    PrepareConfig,
    SubmissionConfig,
    TrainConfig,
)

__all__ = [
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
    "load_experiment",
    "rebuild_experiment",
]
