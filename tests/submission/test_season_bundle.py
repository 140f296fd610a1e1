"""meta.json says what the official packer's says, and the official tools read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pertcast.errors import DataError
from pertcast.files.season_lists import read_targets
from pertcast.seasons import season
from pertcast.submission.season_bundle import contexts_in_force, fingerprint, meta_json, read_bundle

RULES = season("vcc2026", {"num_targets": 3})
FACTS = {"cells": 24, "genes": 20, "stored_values": 99, "contexts": ("A", "B", "C")}
# Recorded from meta.json of an archive that vcc-cli 0.3.0 made with the list ACLY, ABCD1, Zfp1.
RECORDED = "sha256:ff04e15124447b77dbb5178e981cac0ef37c8434e3ba41c10da60e4c8515d40c"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def meta(targets: Path | None) -> dict[str, object]:
    content: dict[str, object] = json.loads(meta_json(RULES, facts=FACTS, targets=targets))
    return content


def test_shape_contexts_and_list(tmp_path: Path) -> None:
    got = meta(write(tmp_path / "t.csv", "target_gene\nACLY\nABCD1\nZfp1\n"))
    assert {name: got[name] for name in ("schema", "nnz", "n_obs", "n_vars", "contexts")} == {
        "schema": 1,
        "nnz": 99,
        "n_obs": 24,
        "n_vars": 20,
        "contexts": ["A", "B", "C"],
    }
    assert got["perts_fingerprint"] == RECORDED
    assert "panel_id" not in got


def test_without_a_list_there_is_no_fingerprint() -> None:
    assert "perts_fingerprint" not in meta(None)


@pytest.mark.parametrize(
    "text",
    [
        "target_gene\r\nZfp1\r\nABCD1\r\nACLY\r\n",
        "\ufefftarget_gene\nACLY\nABCD1\n\nZfp1",
        'target_gene,n_cells,note\nABCD1,400,"a, b"\nACLY,400,\nZfp1,400,x\n',
    ],
)
def test_the_fingerprint_names_the_list_and_not_the_file(tmp_path: Path, text: str) -> None:
    assert fingerprint(read_targets(write(tmp_path / "t.csv", text), RULES)) == RECORDED


def test_the_bundle_names_contexts_and_panel(tmp_path: Path) -> None:
    targets = write(tmp_path / "t.csv", "target_gene\nACLY\n")
    write(tmp_path / "manifest.json", '{"contexts": ["C", " A", "B"], "panel_id": "p1", "partition": "validation"}')
    assert meta(targets)["panel_id"] == "p1"
    in_force, notes = contexts_in_force(RULES, targets, None)
    assert in_force.contexts == (("C", "A", "B"),)
    assert notes == (f"contexts C, A, B, as {tmp_path / 'manifest.json'} says",)


def test_the_panel_of_other_contexts_is_not_recorded(tmp_path: Path) -> None:
    targets = write(tmp_path / "t.csv", "target_gene\nACLY\n")
    write(tmp_path / "manifest.json", '{"contexts": ["D", "E", "F"], "panel_id": "p1"}')
    assert "panel_id" not in meta(targets)


@pytest.mark.parametrize("text", ["", "{", "[]", '"contexts"', '{"kind": "parts"}', "[" * 20_000])
def test_manifests_of_others_are_passed_over(tmp_path: Path, text: str) -> None:
    write(tmp_path / "manifest.json", text)
    assert read_bundle(tmp_path / "t.csv", None, tmp_path / "g.csv") is None
    assert contexts_in_force(RULES, tmp_path / "t.csv") == (RULES, ())


@pytest.mark.parametrize("contexts", ['"A"', "[]", '["A", 1]', '["A", ""]', '["A", "A "]', "null"])
def test_contexts_that_are_no_names(tmp_path: Path, contexts: str) -> None:
    write(tmp_path / "manifest.json", f'{{"contexts": {contexts}}}')
    with pytest.raises(DataError, match="expected a list of different names"):
        read_bundle(tmp_path / "t.csv")
