"""A stage killed at a random moment and run again ends as one that was never killed; benchmarks/kill.py kills more."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kill.py"


@pytest.fixture
def kill() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill"] = module
    spec.loader.exec_module(module)
    return module


def test_reruns_of_killed_stages_end_equal_to_the_bit(tmp_path: Path, kill: ModuleType) -> None:
    stages = kill.make_stages(tmp_path / "w", num_genes=20, cells_per_target=3000)
    struck = kill.kill_at_random(stages, tmp_path / "kills", kills=4, seed=1)
    assert [item.stage for item in struck] == ["generate", "assemble", "pack", "generate"]
    assert all(item.num_bytes for item in struck)
