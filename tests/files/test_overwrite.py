"""pertcast overwrites only what pertcast wrote: every command that writes a file refuses a foreign one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pertcast.cli.app import main
from pertcast.errors import DataError
from pertcast.files.artefacts import Manifest, hash_file, manifest_path, require_replaceable, write_manifest
from pertcast.pipeline import run_experiment
from workspace import Workspace, make_workspace

NOTES = "my own notes, years of work\n"
RULES = ("--rule", "num_genes=20", "--rule", "num_targets=3", "--rule", "max_cells=120")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = make_workspace(tmp_path_factory.mktemp("overwrite") / "w")
    run_experiment(workspace.experiment, workspace.out, overrides=["train.steps=2"])
    return workspace


def commands(workspace: Workspace, out: Path) -> dict[str, tuple[object, ...]]:
    lists = ("--genes", workspace.genes, "--targets", workspace.targets)
    return {
        "assemble": ("assemble", workspace.out / "parts", "--out", out),
        "pack": ("pack", workspace.out / "prediction.h5ad", *lists, "-o", out, *RULES),
        "unpack": ("unpack", workspace.out / "prediction.vcc", "-o", out),
        "sample": ("sample", *lists, "-o", out, *RULES),
        "report": ("report", workspace.out, "-o", out),
    }


def code_of(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


NAMES = ("assemble", "pack", "unpack", "sample", "report")


@pytest.mark.parametrize("name", NAMES)
def test_a_foreign_file_is_refused_and_force_replaces_it(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "victim.h5ad"
    out.write_text(NOTES)
    command = commands(workspace, out)[name]
    assert code_of(*command) == 1
    assert out.read_text() == NOTES
    assert "was not written by pertcast; replace it with --force, or give another --out" in capsys.readouterr().err
    assert code_of(*command, "--force") == 0
    assert out.read_bytes() != NOTES.encode()


@pytest.mark.parametrize("name", NAMES)
def test_what_pertcast_wrote_is_replaced_unless_it_was_changed_since(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "ours"
    command = commands(workspace, out)[name]
    assert code_of(*command) == 0
    first = hash_file(out)
    if name in ("assemble", "pack"):
        # made from something else: it is no longer current
        manifest = manifest_path(out)
        manifest.write_text(manifest.read_text().replace('"inputs": {', '"inputs": {"other": "1", '))
    assert code_of(*command) == 0
    if name != "report":
        assert hash_file(out) == first
        with out.open("ab") as stream:
            stream.write(b"edited")
        assert code_of(*command) == 1
        assert "was changed since pertcast wrote it" in capsys.readouterr().err
        assert out.read_bytes().endswith(b"edited")
        assert code_of(*command, "--force") == 0
        assert hash_file(out) == first


@pytest.mark.parametrize("name", [*NAMES, "train", "generate", "export", "prepare", "compare", "run"])
def test_a_folder_or_file_of_the_wrong_kind_is_one_clear_error(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    victim = tmp_path / "victim"
    more: dict[str, tuple[object, ...]] = {
        "train": ("train", workspace.experiment, "--store", workspace.out / "store", "--out", victim),
        "generate": ("generate", workspace.out / "run", "--out", victim),
        "export": ("export", workspace.out / "run", "--out", victim),
        "prepare": ("prepare", workspace.experiment, "--out", victim),
        "compare": ("compare", workspace.experiment, "--out", victim, "--models", "mean", "--folds", "3"),
        "run": ("run", workspace.experiment, "--out", victim),
    }
    if name in NAMES:
        victim.mkdir()
        command = commands(workspace, victim)[name]
    else:
        victim.write_text(NOTES)
        command = more[name]
    assert code_of(*command) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert str(victim) in error
    assert victim.is_dir() or victim.read_text() == NOTES


def test_a_run_that_died_between_manifest_and_file_is_taken_up(tmp_path: Path) -> None:
    out = tmp_path / "p.h5ad"
    out.write_text("old")
    write_manifest(out, Manifest("prediction", files={out.name: "0" * 64}))
    require: Callable[..., None] = require_replaceable
    with pytest.raises(DataError, match="was changed since"):
        require(out, force=False)
    require(out, force=False, interrupted=True)
