from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pertcast.errors import CheckpointError
from pertcast.files.artefacts import hash_file
from pertcast.generate import generate, parts
from pertcast.pipeline import Outcome, run_experiment
from workspace import Workspace, make_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("parts") / "w")


@pytest.fixture(scope="module")
def trained(workspace: Workspace) -> Outcome:
    return run_experiment(workspace.experiment, workspace.out)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in folder.glob("*/*.h5ad")}


@pytest.mark.parametrize("cells", ["donors", "sparse", "model"])
def test_parts_are_the_same_however_many_are_made_at_once(
    trained: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cells: str
) -> None:
    for cpus in (1, 16):
        monkeypatch.setattr(parts, "available_cpus", lambda cpus=cpus: cpus)
        generate(trained.run, tmp_path / str(cpus), overrides=[f"generate.cells={cells}"])
    assert len(hashes(tmp_path / "1")) == 4
    assert hashes(tmp_path / "1") == hashes(tmp_path / "16")


@pytest.mark.parametrize("cpus", [1, 16])
def test_a_part_that_fails_ends_the_others_and_leaves_no_half_file(
    trained: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpus: int
) -> None:
    predict = parts.PartMaker._predict

    def diverged(self: Any, part: Any, sets_BS: NDArray[np.int64]) -> NDArray[np.float32]:
        cells_CG = predict(self, part, sets_BS)
        return cells_CG * np.float32(np.nan) if part.target == "G2" else cells_CG

    monkeypatch.setattr(parts, "available_cpus", lambda: cpus)
    monkeypatch.setattr(parts.PartMaker, "_predict", diverged)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"G2.h5ad: the model predicts values that are not finite"):
        generate(trained.run, out)
    monkeypatch.undo()
    left = {path.name for path in (out / "H1").iterdir()}
    assert not any(name.startswith((".", "G2")) for name in left)
    generate(trained.run, out)
    generate(trained.run, tmp_path / "whole")
    assert hashes(out) == hashes(tmp_path / "whole")
