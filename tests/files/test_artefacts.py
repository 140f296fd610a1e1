"""Artefacts are whole or not there, and their manifests tell what changed."""

import hashlib
from pathlib import Path

import pytest

from pertcast.errors import CheckpointError, DataError
from pertcast.files.artefacts import (
    Manifest,
    atomic_dir,
    atomic_file,
    hash_file,
    hash_files,
    manifest_path,
    read_manifest,
    remove_leftovers,
    verify_artefact,
    write_manifest,
)


def test_a_failure_leaves_the_previous_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_replaced_as_one(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    for text in ("one", "two"):
        with atomic_dir(folder) as temporary:
            (temporary / f"{text}.txt").write_text(text)
            write_manifest(temporary, Manifest("store"))
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "two.txt"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_failing_folder_leaves_the_previous_one(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with atomic_dir(folder) as temporary:
        write_manifest(temporary, Manifest("store"))
    with pytest.raises(RuntimeError), atomic_dir(folder) as temporary:
        (temporary / "new.txt").write_text("half")
        raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_users_folder_is_never_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="no pertcast artefact"), atomic_dir(folder):
        pass
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_leftovers_of_a_dead_run_are_removed(tmp_path: Path) -> None:
    dead = tmp_path / ".a.txt.partial-0123abcd"
    dead.write_text("half")
    other = tmp_path / "b.txt"
    other.write_text("whole")
    assert remove_leftovers(tmp_path / "a.txt") == [dead]
    assert list(tmp_path.iterdir()) == [other]


def test_a_manifest_reads_back_as_written_and_matches_only_itself(tmp_path: Path) -> None:
    artefact = tmp_path / "prediction.h5ad"
    artefact.write_bytes(b"cells")
    manifest = Manifest("prediction", inputs={"parts": "ab"}, config={"a": {"b": (1, 2)}}, notes=("one",))
    write_manifest(artefact, manifest)
    again = read_manifest(artefact, kind="prediction")
    assert again.files == {"prediction.h5ad": hash_file(artefact)}
    assert again.notes == ("one",)
    assert again.versions["pertcast"]
    assert again.matches(inputs={"parts": "ab"}, config={"a": {"b": (1, 2)}})
    assert not again.matches(inputs={"parts": "ac"}, config={"a": {"b": (1, 2)}})
    assert not again.matches(inputs={"parts": "ab"}, config={"a": {"b": (1, 3)}})


def test_verification_names_what_changed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "a").write_text("a")
    (folder / "b").write_text("b")
    write_manifest(folder, Manifest("run"))
    assert verify_artefact(folder) == []
    (folder / "a").write_text("x")
    (folder / "b").unlink()
    assert [Path(problem.place).name for problem in verify_artefact(folder)] == ["a", "b"]


@pytest.mark.parametrize(("text", "words"), [(None, "no such file"), ("{", "not valid JSON"), ("{}", "not a manifest")])
def test_a_missing_or_broken_manifest_is_one_clear_error(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        manifest_path(tmp_path).write_text(text)
    with pytest.raises(CheckpointError, match=words):
        read_manifest(tmp_path)


def test_another_kind_of_artefact_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, Manifest("store"))
    with pytest.raises(CheckpointError, match="expected a run, got a store"):
        read_manifest(tmp_path, kind="run")


def test_files_are_hashed_in_order_whatever_ends_first(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}" for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * ((20 - number) * 100_000))
    expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert list(hash_files(paths)) == expected


def test_a_file_that_cannot_be_hashed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(hash_files([tmp_path / "none"]))
