"""The report: one page that stands alone, whose parts say what they have or what to run; its figures are plotly's."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from conftest import write_small_h5ad
from pertcast.cli.app import main
from pertcast.config import load_experiment
from pertcast.data.prepare import prepare
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import DataError
from pertcast.ladder.report import write_report
from pertcast.ladder.report.figures import Figure, curves
from pertcast.ladder.report.gather import Material
from pertcast.ladder.report.html import as_script
from pertcast.ladder.report.measure import (
    Cells,
    Group,
    Limits,
    de_tables,
    effects,
    fit_plane,
    sample_h5ad,
    sample_store,
    with_controls,
)
from pertcast.ladder.report.sections import realism
from pertcast.pipeline import run_experiment
from pertcast.seasons import season
from workspace import Workspace, make_workspace

PARTS = ["run", "check", "training", "effects", "cells", "genes", "volcano", "realism", "budget", "ladder"]


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = self.script = ""
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "hr", "img", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.script += data if len(data) < 1_000_000 else ""
        elif not self._open or self._open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def figures(self) -> dict[str, Any]:
        start = self.script.index("{")
        return dict(json.JSONDecoder().raw_decode(self.script[start:])[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A whole run of a small experiment."""
    workspace = make_workspace(tmp_path_factory.mktemp("report") / "w")
    run_experiment(workspace.experiment, workspace.out)
    return workspace


@pytest.fixture(scope="module")
def page(whole: Workspace) -> Page:
    """The page of a whole run."""
    return Page(write_report(whole.out, whole.folder / "page.html"))


def test_the_page_stands_alone(page: Page, whole: Workspace) -> None:
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name) or ""
            assert value.startswith(("#", "data:")) or not value
    policy = next(item["content"] for item in page.all("meta") if item.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "url(" not in (whole.folder / "page.html").read_text(encoding="utf-8").partition("</style>")[0]


def test_the_page_has_every_part_once_and_its_contents_lead_there(page: Page) -> None:
    assert [item["id"] for item in page.all("section")] == PARTS
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert (link["href"] or "")[1:] in ids
    for attributes in (attributes for _, attributes in page.tags if "aria-labelledby" in attributes):
        assert attributes["aria-labelledby"] in ids


def test_every_figure_has_a_text_alternative_and_its_numbers(page: Page) -> None:
    plots = [item for item in page.all("div") if item.get("class") == "plot"]
    assert {item["id"] for item in plots} == set(page.figures())
    assert all(item["role"] == "img" and len(item["aria-label"] or "") > 40 for item in plots)
    assert len(page.all("table")) >= len(plots)
    assert len(page.all("caption")) == len(page.all("table"))
    labels = {item["for"] for item in page.all("label")}
    assert labels == {item["id"] for item in page.all("select")}
    assert labels >= {"volcano-predicted-choice", "volcano-training-choice", "components-choice"}


def test_the_page_can_be_read_on_a_phone(page: Page) -> None:
    viewport = next(item["content"] for item in page.all("meta") if item.get("name") == "viewport")
    assert viewport == "width=device-width, initial-scale=1"
    regions = [item for item in page.all("div") if item.get("class") == "scroll"]
    assert len(regions) == len(page.all("table"))
    assert all(item["tabindex"] == "0" and item["aria-label"] for item in regions)


def test_figures_are_what_plotly_takes(page: Page) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects")
    for figure in page.figures().values():
        for chosen in (figure["data"], *figure["choices"].values()):
            data = [figure["data"][trace] if isinstance(trace, int) else trace for trace in chosen]
            graph_objects.Figure(data=data, layout=figure["layout"])  # raises where a name or a value is not plotly's


def test_the_page_says_what_the_run_was(page: Page) -> None:
    for words in (
        "Season vcc2025: valid.",
        "energy 1, mae 0, de 0, rank 0",
        "1*\u00a0out/prediction.vcc",
        "pertcast ladder record",
    ):
        assert words in page.text


def test_a_run_alone_is_shown_and_what_is_missing_is_named(whole: Workspace, tmp_path: Path) -> None:
    shutil.copytree(whole.out / "run", tmp_path / "run")
    alone = Page(write_report(tmp_path / "run"))
    assert [item["id"] for item in alone.all("section")] == PARTS
    for words in ("`pertcast generate` and `pertcast assemble`", "`pertcast check", "`pertcast generate` writes one"):
        assert words in alone.text
    assert set(alone.figures()) == {"curve-loss", "curve-energy"}


def test_a_run_s_own_folder_finds_what_lies_around_it(whole: Workspace, tmp_path: Path) -> None:
    found = Page(write_report(whole.out / "run", tmp_path / "page.html"))
    assert "volcano-predicted" in found.figures()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a run nor a prediction"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        write_report(tmp_path / "nothing")


def test_truth_stands_beside_the_prediction(
    whole: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = write_small_h5ad(tmp_path / "real.h5ad", seed=3)
    (whole.out / "realism.json").write_text(json.dumps({"zeros": {"<b>": 0.5}, "notes": ["as real cells"]}))
    try:
        with pytest.raises(SystemExit) as ended:
            main(["report", str(whole.out), "--truth", str(truth), "-o", str(tmp_path / "page.html")])
    finally:
        (whole.out / "realism.json").unlink()
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert "volcano-real" in page.figures()
    names = [trace["name"] for trace in page.figures()["effect-sizes"]["data"]]
    assert names == ["against training cells", "against held-out cells", "against real cells", "equal"]
    assert "zeros.<b>" in page.text
    assert "as real cells" in page.text


def test_realism_is_shown_as_the_check_writes_it() -> None:
    likeness = {"num_cells": 100, "de_calls": 3, "variance_ratio": [0.8, 1.0, 1.25], "zero_difference": [0.0] * 4,
                "correlation": None}  # fmt: skip
    context = {"context": "A", "real": likeness, "null": likeness, "targets": None, "totals": {},
               "verdicts": [["few genes are DE", False, "3 of 2"]]}  # fmt: skip
    html = realism(Material(Path(), realism={"contexts": [context], "notes": ["a note"]})).html
    for words in (
        "few genes are DE",
        "✗ no",
        "0.8, 1, 1.25",
        "predicted controls",
        "a note",
        "How the cells look in A",
    ):
        assert words in html
    assert "targets, median" not in html


def dense(cells: Cells, rows: np.ndarray) -> np.ndarray:
    return cells.log1p[rows].toarray().astype(np.float64)


def test_effects_are_differences_of_means_with_the_noise_of_both(whole: Workspace) -> None:
    cells = sample_h5ad(whole.out / "prediction.h5ad", season("vcc2025"), title="predicted", target_sum=None)
    found = effects(cells)
    whole_file = ad.read_h5ad(whole.out / "prediction.h5ad")
    for place, group in enumerate(cells.groups):
        ours = whole_file[whole_file.obs["target_gene"] == group.target].X.toarray().astype(np.float64)
        control = whole_file[whole_file.obs["target_gene"] == "non-targeting"].X.toarray().astype(np.float64)
        np.testing.assert_allclose(found.effect[place], ours.mean(0) - control.mean(0), atol=1e-6)
        spread = ours.var(0, ddof=1) / len(ours) + control.var(0, ddof=1) / len(control)
        assert found.noise[place] == pytest.approx(np.sqrt(spread.sum()), rel=1e-6)
        own = cells.genes.index(group.target)
        left = np.expm1(ours[:, own].mean()) / np.expm1(control[:, own].mean())
        assert found.left[place] == pytest.approx(left, rel=1e-5)


def test_a_sample_is_bounded_and_depends_on_its_group_alone(whole: Workspace) -> None:
    rules, path = season("vcc2025"), whole.out / "prediction.h5ad"
    small = sample_h5ad(
        path, rules, title="p", target_sum=None, limits=Limits(cells=60, cells_per_group=25, controls=5)
    )
    assert [len(small.rows(code)) for code in range(4)] == [20, 20, 20, 5]
    assert small.num_cells == (29, 40, 44)  # the cap leaves no room for all
    fewer = sample_h5ad(path, rules, title="p", target_sum=None, limits=Limits(groups=1, cells_per_group=20))
    assert (dense(fewer, fewer.rows(0)) == dense(small, small.rows(0))).all()


def test_counts_and_log1p_of_the_same_cells_are_the_same(tmp_path: Path) -> None:
    counts = ad.read_h5ad(write_small_h5ad(tmp_path / "counts.h5ad"))
    totals = (
        counts.X.sum(1).A1[:, None] if hasattr(counts.X.sum(1), "A1") else np.asarray(counts.X.sum(1)).reshape(-1, 1)
    )
    logged = counts.copy()
    logged.X = sparse.csr_matrix(np.log1p(counts.X.toarray() * (500.0 / totals)).astype(np.float32))
    logged.write_h5ad(tmp_path / "log1p.h5ad")
    both = [
        sample_h5ad(tmp_path / f"{name}.h5ad", season("vcc2025"), title="p", target_sum=500.0)
        for name in ("counts", "log1p")
    ]
    np.testing.assert_allclose(both[0].log1p.toarray(), both[1].log1p.toarray(), atol=1e-5)


def test_cells_without_controls_take_those_of_the_store(whole: Workspace) -> None:
    store = Store.open(whole.out / "store")
    training = sample_store(store, [Group("", "G1"), Group("", "nothing")], split=Split.TRAIN, title="training")
    assert training is not None
    assert [group.target for group in training.groups] == ["G1"]
    control = training.control_code(training.groups[0])
    bare = training.codes != control
    without = replace(training, log1p=training.log1p[bare], codes=training.codes[bare])
    assert np.isnan(effects(without).effect).all()
    assert de_tables(without) == {}
    np.testing.assert_array_equal(effects(with_controls(without, training)).effect, effects(training).effect)
    assert sample_store(store, [Group("", "nothing")], split=Split.TRAIN, title="training") is None


def test_groups_without_a_context_are_of_the_one_that_is_named(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "w")
    write_small_h5ad(workspace.data, contexts=("A", "B"))
    store = Store.open(prepare(load_experiment(workspace.experiment), tmp_path / "store"))
    sizes = []
    for within in (None, "A", "C"):
        cells = sample_store(store, [Group("", "G1")], split=Split.TRAIN, title="training", within=within)
        sizes.append(0 if cells is None else cells.num_cells[0])
    everywhere = len(store.rows(split=Split.TRAIN, pert=store.perts.index("G1")))
    assert sizes == [everywhere, len(store.rows(split=Split.TRAIN, context=0, pert=store.perts.index("G1"))), 0]
    assert sizes[1] < everywhere


def test_the_plane_is_that_of_a_plain_decomposition() -> None:
    rng = np.random.default_rng(0)
    values = rng.gamma(1.0, size=(40, 6)).astype(np.float32)
    cells = Cells(
        "training",
        tuple("abcdef"),
        (Group("", "x"),),
        ("",),
        sparse.csr_matrix(values),
        np.zeros(40, dtype=np.int64),
        (40,),
    )
    found = fit_plane(cells)
    assert found is not None
    centred = values - values.mean(0, dtype=np.float64)
    variances, directions = np.linalg.eigh(centred.T @ centred)
    np.testing.assert_allclose(found.shares, variances[::-1][:2] / variances.sum(), rtol=1e-6)
    np.testing.assert_allclose(
        np.abs(found.project(cells.log1p)), np.abs(centred @ directions[:, ::-1][:, :2]), atol=1e-5
    )


def test_long_curves_are_means_of_neighbours() -> None:
    lines = [{"kind": "train", "step": step, "loss": float(step), "grad_norm": 1.0} for step in range(1, 6001)]
    (figure,) = curves(lines)
    assert isinstance(figure, Figure)
    (trace,) = figure.data
    assert len(trace["x"]) == 600
    assert (trace["x"][0], trace["y"][0]) == (10, 5.5)


def test_what_stands_in_a_script_cannot_end_it() -> None:
    assert "<" not in as_script({"name": "</script><!--"})
    assert json.loads(as_script({"name": "</script>"})) == {"name": "</script>"}
