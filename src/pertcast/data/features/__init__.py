"""Perturbation features, read from a file or fitted on training controls; missing ones are never filled silently."""

from pertcast.data.features.coexpression import FeatureStore
from pertcast.data.features.load import load_features
from pertcast.data.features.readers import read_vectors
from pertcast.data.features.table import CoverageRow, PertFeatures, coverage, open_features, save_features

__all__ = [
    "CoverageRow",
    "FeatureStore",
    "PertFeatures",
    "coverage",
    "load_features",
    "open_features",
    "read_vectors",
    "save_features",
]
