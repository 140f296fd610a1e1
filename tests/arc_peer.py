"""Runs of arc-state, and what it predicts of them, for tests that compare."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from pertcast.arc import ArcFolder
from pertcast.models.state import StateTransition

ORACLE = Path(__file__).with_name("arc_oracle.py")


def call_oracle(*arguments: str | Path) -> None:
    """Run the oracle in a Python that has arc-state; skip where there is none."""
    python = os.environ.get("PERTCAST_ARC_PYTHON")
    if python is None:
        pytest.skip("PERTCAST_ARC_PYTHON names no Python with arc-state")
    ran = subprocess.run([python, ORACLE, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]


def require_arc_version(*oldest: int) -> None:
    """Skip where the arc-state that there is is older."""
    python = os.environ.get("PERTCAST_ARC_PYTHON")
    if python is not None:
        code = "from importlib.metadata import version; print(version('arc-state'))"
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        if tuple(int(part) for part in found.split(".")) < oldest:
            pytest.skip(f"it is for arc-state {'.'.join(map(str, oldest))} and later, and this is {found}")


@pytest.fixture(scope="session")
def arc_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run for each option; given as PERTCAST_ARC_RUNS, or trained here."""
    if "PERTCAST_ARC_RUNS" in os.environ:
        return Path(os.environ["PERTCAST_ARC_RUNS"])
    folder = tmp_path_factory.mktemp("arc")
    call_oracle("make", folder)
    return folder


def run_of(arc_runs: Path, name: str) -> Path:
    if not (arc_runs / name / "out.npz").is_file():
        pytest.skip("arc-state's GPT-2 does not start with this version of transformers")
    return arc_runs / name


def has_decoder(folder: ArcFolder) -> bool:
    """Whether a decoder was trained; the first versions always do so where one could be of use."""
    return any(weight.startswith("gene_decoder.") for weight in folder.weights)


def require_same_output(model: StateTransition, path: Path) -> None:
    out = {name: torch.from_numpy(value) for name, value in np.load(path / "out.npz").items()}
    with torch.inference_mode():
        found = model(out["control"], out["pert"], out["batch"])
    assert out["latent"].std() > 0.01
    torch.testing.assert_close(found.latent_BSO, out["latent"], atol=1e-5, rtol=1e-5)
    if found.genes_BSG is not None:
        assert out["genes"].std() > 0.01
        torch.testing.assert_close(found.genes_BSG, out["genes"], atol=1e-5, rtol=1e-5)
    assert (found.confidence_B is None) == ("confidence" not in out)
    if found.confidence_B is not None:
        torch.testing.assert_close(found.confidence_B, out["confidence"], atol=1e-5, rtol=1e-5)
