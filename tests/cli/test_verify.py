"""`pertcast verify` tells what is whole from what is not, for every kind of artefact and every one of its files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pertcast.cli.app import main
from pertcast.files.artefacts import manifest_path, read_manifest
from pertcast.pipeline import run_experiment
from workspace import make_workspace

KINDS = {
    "store": "store",
    "run": "run",
    "parts": "parts",
    "prediction": "prediction.h5ad",
    "submission": "prediction.vcc",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of a whole run."""
    workspace = make_workspace(tmp_path_factory.mktemp("verify") / "w")
    run_experiment(workspace.experiment, workspace.out)
    return workspace.out


@pytest.fixture
def artefact(made: Path, kind: str, tmp_path: Path) -> Path:
    """A copy of one artefact with its manifest, to be spoiled."""
    source = made / KINDS[kind]
    copy = tmp_path / source.name
    if source.is_dir():
        shutil.copytree(source, copy)
    else:
        shutil.copy(source, copy)
        shutil.copy(manifest_path(source), manifest_path(copy))
    return copy


def verify(artefact: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main(["verify", str(artefact)])
    out, err = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, out + err


def files_of(artefact: Path) -> list[Path]:
    base = artefact if artefact.is_dir() else artefact.parent
    return [base / name for name in read_manifest(artefact).files]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_whole(artefact: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(artefact, capsys) == (0, f"{artefact}: a {kind}, whole ({len(files_of(artefact))} file(s))\n")


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_altered_by_a_bit_cut_or_gone(artefact: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    for path in files_of(artefact):
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for content in (bytes(flipped), whole[:-1], whole + b"\0"):
            path.write_bytes(content)
            code, text = verify(artefact, capsys)
            assert (code, f"{path}: its content is not what the manifest says" in text) == (1, True)
        path.unlink()
        code, text = verify(artefact, capsys)
        assert code == 1
        assert "not there" in text or "no such file" in text
        path.write_bytes(whole)
    assert verify(artefact, capsys)[0] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spoil", ["gone", "cut", "empty", "another"])
def test_a_manifest_that_cannot_be_believed(
    artefact: Path, kind: str, spoil: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = manifest_path(artefact)
    text = path.read_text()
    path.unlink() if spoil == "gone" else path.write_text({"cut": text[:-9], "empty": "", "another": "[]"}[spoil])
    code, said = verify(artefact, capsys)
    assert code == 1
    assert said.startswith("pertcast: ")
    assert "Traceback" not in said
