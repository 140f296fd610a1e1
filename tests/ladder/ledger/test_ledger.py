"""The ledger: submissions found by their manifests, scores that stay, differences and improvements."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pertcast.cli.app import main
from pertcast.config import RUNGS, rung_of
from pertcast.errors import DataError
from pertcast.files.artefacts import (
    Manifest,
    Provenance,
    hash_file,
    manifest_path,
    read_manifest,
    write_json,
    write_manifest,
)
from pertcast.ladder.ledger import (
    Record,
    compare_scores,
    find_submission,
    read_ledger,
    read_records,
    read_status,
    record_scores,
    scores_path,
)
from pertcast.ladder.ledger.ledger import difference
from pertcast.pipeline import run_experiment
from workspace import Workspace, make_workspace

C1: dict[str, Any] = {
    "loss": dict(RUNGS["c1"]),
    "model": {"preset": "tiny"},
    "train": {"steps": 5},
    "datasets": {"a": "/x"},
}


def make_archive(path: Path, experiment: dict[str, Any] | None, *, packed_at: str, content: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content or f"{path} {packed_at}")
    origin = Provenance("w" + packed_at, str(path.parent / "run"), 5, "s" * 64, experiment or {}).as_facts()
    facts = origin if experiment else {}
    inputs = {"prediction": "p" + packed_at, "genes": "g", "targets": "t"}
    write_manifest(path, Manifest("submission", inputs=inputs, config={"season": "vcc2025"}, facts=facts))
    seconds = datetime.fromisoformat(packed_at).timestamp()
    for written in (path, manifest_path(path)):
        os.utime(written, (seconds, seconds))
    return path


def changed(experiment: dict[str, Any], **loss: float) -> dict[str, Any]:
    return {**experiment, "loss": {**experiment["loss"], **loss}}


def say(archive: Path, **metrics: float) -> None:
    assert record_scores(archive, Record(hash_file(archive), metrics, "2026-01-01T00:00:00Z"))[1]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """C1 and C2, packed one after the other."""
    first = make_archive(tmp_path / "b" / "prediction.vcc", C1, packed_at="2026-01-01T00:00:00Z")
    second = make_archive(
        tmp_path / "a" / "deep" / "er" / "x.vcc", changed(C1, mae=10.0), packed_at="2026-01-02T00:00:00Z"
    )
    return first, second


def test_submissions_stand_in_the_order_of_packing_with_rung_and_difference(
    tmp_path: Path, two: tuple[Path, Path]
) -> None:
    ledger = read_ledger([tmp_path])
    assert [item.archive for item in ledger.submissions] == list(two)
    assert [item.sha256 for item in ledger.submissions] == [hash_file(path) for path in two]
    assert [item.rung for item in ledger.submissions] == ["c1", "c2"]
    assert ledger.changed(1) is None
    assert ledger.changed(2) == {"loss.mae": (0.0, 10.0)}
    assert ledger.trade_offs() == []


def test_improvements_are_signed_so_that_more_is_better(tmp_path: Path, two: tuple[Path, Path]) -> None:
    third = make_archive(tmp_path / "c.vcc", changed(C1, mae=10.0, de=0.5), packed_at="2026-01-03T00:00:00Z")
    for archive, mae, des in zip((*two, third), (0.4, 0.3, 0.35), (0.1, 0.1, 0.2), strict=True):
        say(archive, mae=mae, des=des)
    ledger = read_ledger([tmp_path])
    moved = ledger.moved(1, 2)
    assert moved["mae"].relative == pytest.approx(0.25)
    assert moved["des"].relative == 0
    assert ledger.moved(2, 3)["mae"].relative == pytest.approx(-1 / 6)
    assert (ledger.previous(3), ledger.first(3)) == (2, 1)
    trade_offs = ledger.by_key()
    assert list(trade_offs) == ["loss.mae", "loss.de"]
    assert trade_offs["loss.de"][0].moved["des"].relative == pytest.approx(1.0)
    assert json.loads(json.dumps(ledger.as_json()))["trade_offs"][1]["changed"] == {"loss.de": [0.0, 0.5]}


def test_a_metric_of_unknown_direction_or_from_zero_has_no_relative_improvement() -> None:
    found = compare_scores({"mae_score": 1.0, "des": 0.0}, {"mae_score": 2.0, "des": 0.1, "pds": 0.5})
    assert found["mae_score"].improvement is None
    assert (found["des"].improvement, found["des"].relative) == (0.1, None)
    assert "pds" not in found


def test_records_only_grow_and_the_same_is_not_added_twice(two: tuple[Path, Path]) -> None:
    archive, sha256 = two[0], hash_file(two[0])
    one = Record(sha256, {"overall": 0.1}, "2026-01-01T00:00:00Z", entry="1")
    assert record_scores(archive, one)[1]
    assert not record_scores(archive, replace(one, recorded_at="later"))[1]
    assert record_scores(archive, replace(one, metrics={"overall": 0.2}))[1]
    assert [item.metrics["overall"] for item in read_records(archive)] == [0.1, 0.2]
    scores = read_ledger([archive]).submissions[0].scores
    assert scores is not None
    assert scores.metrics == {"overall": 0.2}


def test_broken_scores_are_named_and_left_alone(two: tuple[Path, Path]) -> None:
    path = scores_path(two[0])
    path.write_text("{")
    with pytest.raises(DataError, match="move it away"):
        record_scores(two[0], Record("x", {"mae": 0.1}, "now"))
    assert path.read_text() == "{"
    for metrics in ({}, {"mae": float("nan")}):
        with pytest.raises(DataError, match="give --overall"):
            record_scores(two[1], Record("x", metrics, "now"))


def test_scores_do_not_pass_to_what_is_packed_later_under_the_same_name(tmp_path: Path, two: tuple[Path, Path]) -> None:
    item = find_submission(two[0])
    record_scores(two[0], Record(item.sha256, {"mae": 0.4}, "now", submission=item.snapshot()))
    make_archive(two[0], changed(C1, rank=0.5), packed_at="2026-01-05T00:00:00Z")
    ledger = read_ledger([tmp_path])
    assert [(item.state, item.rung) for item in ledger.submissions] == [
        ("replaced", "c1"), ("packed", "c2"), ("packed", "other")
    ]  # fmt: skip
    assert [item.scores is not None for item in ledger.submissions] == [True, False, False]


def test_an_archive_without_a_manifest_is_listed_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "official.vcc"
    path.write_text("packed elsewhere")
    (item,) = read_ledger([tmp_path]).submissions
    assert (item.sha256, item.rung, item.kind, item.provenance) == (hash_file(path), None, None, None)


def test_a_removed_archive_stays_in_the_ledger(tmp_path: Path, two: tuple[Path, Path]) -> None:
    two[0].unlink()
    assert [item.state for item in read_ledger([tmp_path]).submissions] == ["removed", "packed"]


@pytest.mark.parametrize(
    ("ours", "theirs", "comparable"),
    [
        ({}, {}, True),
        ({"about": {"panel_id": "a"}}, {}, True),
        ({"about": {"panel_id": "a"}}, {"about": {"panel_id": "b"}}, False),
        ({"about": {"anchor_version": "a"}}, {"about": {"anchor_version": "b"}}, False),
        ({"source": "pertcast score"}, {}, False),
        ({"source": "vcc status"}, {"source": "typed"}, True),
    ],
)
def test_only_scores_of_one_kind_are_compared(
    tmp_path: Path, two: tuple[Path, Path], ours: dict[str, Any], theirs: dict[str, Any], *, comparable: bool
) -> None:
    for archive, more in zip(two, (ours, theirs), strict=True):
        record_scores(archive, Record(hash_file(archive), {"overall": 0.1}, "now", **more))
    assert (read_ledger([tmp_path]).previous(2) == 1) is comparable


def test_the_place_of_a_file_is_no_difference_where_its_content_is_the_same(tmp_path: Path) -> None:
    moved = {**C1, "datasets": {"a": "/elsewhere"}, "submission": {"genes": "/elsewhere/genes.csv"}}
    make_archive(tmp_path / "a.vcc", C1, packed_at="2026-01-01T00:00:00Z")
    make_archive(tmp_path / "b.vcc", moved, packed_at="2026-01-02T00:00:00Z")
    assert read_ledger([tmp_path]).changed(2) == {}


def test_differences_are_dotted_keys_of_both_sides() -> None:
    assert difference({"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 1, "c": [2]}, "e": 3}) == {
        "a.c": ([1], [2]), "d": (2, None), "e": (None, 3)
    }  # fmt: skip


@pytest.mark.parametrize("rung", RUNGS)
def test_a_rung_is_known_by_its_weights(rung: str) -> None:
    assert rung_of(RUNGS[rung]) == rung
    assert rung_of({**RUNGS[rung], "mae": 0.123}) == "other"


def test_the_status_of_both_seasons_is_read() -> None:
    old = {"entry_id": 7, "status": "published", "score_avg": 0.1, "de_score": 0.2, "pert_score": 0.6,
           "mae_score": 0.03, "rank": 12, "score_pds": None}  # fmt: skip
    found = read_status(json.dumps(old), place="-")
    assert found.metrics == {"overall": 0.1, "des": 0.2, "pds": 0.6, "mae_score": 0.03}
    assert (found.source, found.entry, found.about["rank"]) == ("vcc status", "7", 12)
    new = {
        "entry_id": "x",
        "status": "published",
        "score_avg": -0.1,
        "score_jac": -0.2,
        "panel_id": "p",
        "is_terminal": True,
    }
    assert read_status(json.dumps(new), place="-").metrics == {"overall": -0.1, "score_jac": -0.2}
    own = read_status(json.dumps({"season": "vcc2025", "overall": {"mae": 0.1, "des": None, "num": 3}}), place="-")
    assert (own.source, own.metrics) == ("pertcast score", {"mae": 0.1})


@pytest.mark.parametrize("text", ["{", "[]", '{"status": "scoring", "score_avg": null}', '{"score_avg": true}'])
def test_a_status_without_scores_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"f\.json"):
        read_status(text, place="f.json")


def test_a_place_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read_ledger([tmp_path / "nothing"])


def test_a_folder_with_several_archives_or_none_is_refused(tmp_path: Path, two: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="2 archives"):
        find_submission(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no archive"):
        find_submission(tmp_path / "empty")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A whole run of a small experiment."""
    workspace = make_workspace(tmp_path_factory.mktemp("whole") / "w")
    run_experiment(workspace.experiment, workspace.out)
    return workspace


@pytest.mark.parametrize("left", ["all", "the archive alone", "manifests without an origin"])
def test_an_archive_leads_back_to_its_checkpoint(whole: Workspace, tmp_path: Path, left: str) -> None:
    out = tmp_path / "moved"
    shutil.copytree(whole.out, out)
    weights = read_manifest(out / "run").files["weights.safetensors"]
    if left == "the archive alone":
        for path in (out / "store", out / "run", out / "parts"):
            shutil.rmtree(path)
        (out / "prediction.h5ad").unlink()
    elif left == "manifests without an origin":
        for path in (out / "prediction.vcc", out / "prediction.h5ad", out / "parts"):
            raw = json.loads(manifest_path(path).read_text())
            del raw["facts"]["origin"]
            write_json(manifest_path(path), raw)
    (item,) = read_ledger([out]).submissions
    assert item.provenance is not None
    assert (item.provenance.weights, item.rung, item.kind, item.provenance.step) == (weights, "c1", "state", 12)
    assert item.provenance.experiment["train"]["steps"] == 12
    assert item.run_is_there
    assert item.run == (whole.out / "run" if left == "the archive alone" else out / "run")


def test_the_commands_record_and_list(
    whole: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["ladder", *map(str, arguments)])
        assert ended.value.code == 0
        return capsys.readouterr().out

    monkeypatch.chdir(whole.folder)
    assert "no scores yet" in run()
    assert "MAE 0.25" in run("record", "out/run", "--mae", 0.25, "--overall", -0.5, "--entry", "e1")
    assert "nothing added" in run("record", "out", "--mae", 0.25, "--overall", -0.5, "--entry", "e1")
    Path("s.json").write_text('{"entry_id": "e1", "score_avg": 0.5}')
    assert "1 earlier record(s)" in run("record", "out/prediction.vcc", "--from", "s.json")
    text = run("out")
    for line in (
        "1  c1 · state · out/prediction.vcc",
        "checkpoint out/run, step 12",
        "Overall 0.5 (vcc status, entry e1",
    ):
        assert line in text
    (row,) = json.loads(run("--json"))["submissions"]
    assert [record["metrics"] for record in row["history"]] == [{"overall": -0.5, "mae": 0.25}, {"overall": 0.5}]
    with pytest.raises(SystemExit) as ended:
        main(["ladder", "record", "out", "--mae", "1", "--from", "s.json"])
    assert ended.value.code == 1
    assert "given twice" in capsys.readouterr().err
