"""benchmarks/gpu.py at its smallest: it must run wherever the tests do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.gpu import SMALL, measure, measured_peak, network_flops, rows_of, write_data

from pertcast.config import ModelConfig
from pertcast.models.spec import spec_for
from pertcast.models.state import StateTransition


def test_it_trains_and_generates_and_measures_both(tmp_path: Path) -> None:
    setting = replace(SMALL, steps=4, num_genes=40, num_hvgs=10, cells_per_target=12, generated=5)
    experiment = write_data(tmp_path, setting)
    rows = list(rows_of(setting, compiled=(False,), precisions=("fp32", "bf16")))
    assert [(row.input, row.precision) for row in rows] == [
        ("hvg", "fp32"),
        ("hvg", "bf16"),
        ("genes", "fp32"),
        ("genes", "bf16"),
    ]
    row = measure(experiment, setting, rows[3])
    assert min(row.first_step_seconds, row.sets_per_second, row.flops_per_second, row.generated_per_second) > 0
    assert 0 <= row.waiting < 1
    assert measured_peak("fp32", 64) > 0


def test_flops_are_two_a_weight_and_cell_and_twice_that_backwards() -> None:
    config = ModelConfig(preset="tiny", set_size=1, context_embedding=False)
    spec = spec_for(config, num_genes=50, input_dim=50, output_dim=50, pert_dim=50, num_batches=0, num_contexts=1)
    network = StateTransition(spec)
    weights = sum(value.numel() for name, value in network.named_parameters() if value.dim() == 2)
    # With one cell in a set attention is nearly nothing; the input needs no gradient.
    assert network_flops(spec, 64) == pytest.approx(6 * weights * 64, rel=0.12)
