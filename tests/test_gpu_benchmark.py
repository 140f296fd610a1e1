"""benchmarks/gpu.py at its smallest: it must run wherever the tests do."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.gpu import GPU, main, rows_of
from benchmarks.gpu_child import Mark, network_flops, summary

from pertcast.config import ModelConfig
from pertcast.models.spec import spec_for
from pertcast.models.state import StateTransition

_PEER = """
import json, sys
print("{}", json.dumps({"sets_per_second": 2 if "bf16" in sys.argv else 1, "precision": sys.argv[-1]}), sep="\\n")
"""


def _cells(page: str, name: str) -> list[str]:
    line = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_it_trains_and_generates_and_compares_in_one_table(tmp_path: Path) -> None:
    script, result, data = tmp_path / "peer.py", tmp_path / "gpu.md", tmp_path / "data"
    script.write_text(_PEER)
    given = ["--small", "--data", str(data), "--result", str(result), "--set", "train.precision=fp32"]
    main([*given, "--peer", str(tmp_path), "--peer-script", str(script), "--rows", "1", "3", "5"])
    page = result.read_text()
    ours, peer, generation = (
        _cells(page, name) for name in ("2 sets, 60 HVGs", "arc-state's step, 2 sets, 60 HVGs", "generation, 300 genes")
    )
    assert peer[1] == "2, bf16"
    assert float(ours[2]) == pytest.approx(float(ours[1].replace(",", "")) / 2, rel=0.3)
    assert 0 < float(ours[3]) < float(ours[4]) + 1
    assert 0 <= float(ours[5].rstrip("%")) < 100
    assert int(ours[6].replace(",", "")) > 0
    assert int(generation[1].replace(",", "")) > 0
    assert not {"run", "trained", "parts", "cells.h5ad"} & {path.name for path in data.iterdir()}

    main([*given, "--minutes", "0", "--rows", "1"])
    assert _cells(result.read_text(), "2 sets, 60 HVGs")[1] == "skipped: the time is up"
    with pytest.raises(SystemExit, match="other data"):
        main(["--data", str(data), "--prepare-only"])


def test_the_most_telling_rows_come_first() -> None:
    rows = rows_of(GPU)
    assert [(row.kind, row.genes, row.sets) for row in rows[:5]] == [
        ("train", "hvg", 32),
        ("train", "genes", 32),
        ("peer", "hvg", 32),
        ("peer", "genes", 32),
        ("generate", "genes", 0),
    ]
    assert len(set(rows)) == len(rows)


def test_only_the_last_stretch_counts_and_full_speed_is_when_it_began() -> None:
    slow = [Mark(float(second), second + 1, 0.5 * second) for second in range(20)]
    fast = [Mark(20 + 0.1 * number, 21 + number, 10.0) for number in range(101)]
    found = summary([*slow, *fast], 40)
    assert found["rate"] == pytest.approx(10)
    assert found["timed"] == 80
    assert found["waiting"] == 0
    assert found["full_at"] == pytest.approx(20, abs=1)
    assert found["first_at"] == 0


def test_flops_are_two_a_weight_and_cell_and_twice_that_backwards() -> None:
    config = ModelConfig(preset="tiny", set_size=1, context_embedding=False)
    spec = spec_for(config, num_genes=50, input_dim=50, output_dim=50, pert_dim=50, num_batches=0, num_contexts=1)
    network = StateTransition(spec)
    weights = sum(value.numel() for name, value in network.named_parameters() if value.dim() == 2)
    # With one cell in a set attention is nearly nothing; the input needs no gradient.
    assert network_flops(spec, 64) == pytest.approx(6 * weights * 64, rel=0.12)
