"""Few-shot adaptation: few parameters learn, all others stay to the bit, and an ordinary run comes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pertcast.train.closed_form
from adapt_bench import Bench, changed
from conftest import SMALL_GENES, write_small_h5ad
from pertcast.config import ModelConfig
from pertcast.data.features import open_features
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import CheckpointError, ConfigError, DataError
from pertcast.files.artefacts import verify_artefact
from pertcast.generate import generate
from pertcast.models.few_parameters import choose, grow, merge, parse_learn
from pertcast.models.run_folder import Run, open_run
from pertcast.models.spec import spec_for
from pertcast.models.state import StateTransition
from pertcast.train.closed_form import least_squares_gain, offset_of
from training_bench import Watcher, interrupt, lines

LEARNT = {"context_encoder.weight", "project_out.3.bias"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def plain(bench: Bench) -> Path:
    """A run without embeddings."""
    return bench.train("plain")


@pytest.fixture(scope="module")
def embedded(bench: Bench) -> Path:
    """A run that embeds contexts and batches, with a DE head."""
    return bench.train(
        "embedded", "model.context_embedding=true", "model.batch_embedding=true", "loss.de=0.5", "loss.de_head=learned"
    )


@pytest.fixture(scope="module")
def adapted(bench: Bench, plain: Path) -> Path:
    return bench.adapt(plain, "adapted")


def test_only_the_line_s_row_and_the_output_bias_learn_and_all_else_is_the_same_to_the_bit(
    plain: Path, adapted: Path
) -> None:
    assert changed(plain, adapted) == LEARNT
    rows = load_file(adapted / "weights.safetensors")["context_encoder.weight"]
    assert rows.shape == (3, 16)
    assert not rows[:2].any()
    assert rows[2].any()
    run = open_run(adapted)
    assert run.contexts == ("H1", "H2", "K2")
    assert run.metrics["num_learning"] == 16 + len(SMALL_GENES)
    assert run.metrics["share_learning"] == run.metrics["num_learning"] / run.metrics["num_parameters"]
    assert "36 of" in " ".join(run.notes)
    assert run.store_fingerprint == Store.open(run.store_path).fingerprint
    assert run.target_sum == open_run(plain).target_sum
    assert verify_artefact(adapted) == []


def test_known_lines_and_batches_keep_their_rows(bench: Bench, embedded: Path) -> None:
    before = load_file(embedded / "weights.safetensors")
    after = load_file(bench.adapt(embedded, "few") / "weights.safetensors")
    assert torch.equal(after["context_encoder.weight"][:2], before["context_encoder.weight"])
    assert not torch.equal(after["context_encoder.weight"][2], before["context_encoder.weight"].mean(0))
    unknown = before["batch_encoder.weight"][-1]
    assert torch.equal(
        after["batch_encoder.weight"], torch.stack([*before["batch_encoder.weight"][:-1], *[unknown] * 2])
    )
    assert torch.equal(after["de_head.state.weight"], before["de_head.state.weight"])
    again = load_file(bench.adapt(embedded, "batch", "adapt.trainable='batch'") / "weights.safetensors")
    assert torch.equal(again["batch_encoder.weight"][[0, 1, 3]], after["batch_encoder.weight"][[0, 1, 3]])
    assert not torch.equal(again["batch_encoder.weight"][2], unknown)
    assert torch.equal(again["project_out.3.bias"], before["project_out.3.bias"])


@pytest.mark.parametrize("embeds", [False, True])
def test_before_anything_is_learnt_the_network_predicts_as_before(embeds: bool) -> None:
    config = ModelConfig(preset="tiny", context_embedding=embeds, batch_embedding=embeds)
    spec = spec_for(config, num_genes=5, input_dim=5, output_dim=5, pert_dim=3, num_batches=2, num_contexts=2)
    old = StateTransition(spec).eval()
    grown, weights = grow(spec, old.state_dict(), new_contexts=1, new_batches=1, num_contexts=2)
    new = StateTransition(grown).eval()
    new.load_state_dict(weights)
    random = torch.Generator().manual_seed(0)
    cells, pert = torch.rand(2, 8, 5, generator=random), torch.rand(2, 3, generator=random)
    batches, contexts = torch.tensor([[0, 1, -1, 0, 1, 1, 0, 0]] * 2), torch.tensor([0, 1])
    assert torch.equal(old(cells, pert, batches, contexts).log1p_BSG, new(cells, pert, batches, contexts).log1p_BSG)
    if not embeds:
        contexts[:] = 2  # the new line, before it has learnt
        assert torch.equal(old(cells, pert).log1p_BSG, new(cells, pert, batches, contexts).log1p_BSG)
    else:
        unknown = new(cells, pert, torch.full_like(batches, -1), contexts).log1p_BSG
        assert torch.equal(unknown, new(cells, pert, torch.full_like(batches, 2), contexts).log1p_BSG)


@pytest.mark.parametrize("genes", [2_000, 18_080])
def test_at_most_half_a_percent_of_state_sm_learns(genes: int) -> None:
    config = ModelConfig(preset="state_sm", context_embedding=True)
    spec = spec_for(
        config, num_genes=genes, input_dim=genes, output_dim=genes, pert_dim=1280, num_batches=48, num_contexts=2
    )
    with torch.device("meta"):
        network = StateTransition(spec)
    total = sum(parameter.numel() for parameter in network.parameters())
    number = choose(network, parse_learn("context,bias"), contexts=[1], batches=[], generator=torch.Generator())
    assert number == 672 + genes
    assert number <= 0.005 * total


def test_low_rank_changes_are_merged(bench: Bench, plain: Path) -> None:
    adapted = bench.adapt(plain, "lora", "adapt.trainable='lora:2'")
    attention = {f"transformer_backbone.layers.0.self_attn.{name}_proj.weight" for name in ("q", "k", "v", "o")}
    assert changed(plain, adapted) == {*attention, "context_encoder.weight"}
    assert not load_file(adapted / "weights.safetensors")["context_encoder.weight"].any()
    before, after = (load_file(run / "weights.safetensors") for run in (plain, adapted))
    assert all(torch.linalg.matrix_rank(after[name] - before[name], atol=1e-6) <= 2 for name in attention)
    assert open_run(adapted).metrics["num_learning"] == 4 * 2 * (16 + 16)


def test_a_merged_network_predicts_as_the_one_that_learnt() -> None:
    spec = spec_for(
        ModelConfig(preset="tiny"), num_genes=5, input_dim=5, output_dim=5, pert_dim=3, num_batches=0, num_contexts=0
    )
    network = StateTransition(spec).eval()
    random = torch.Generator().manual_seed(1)
    choose(network, parse_learn("lora:3,last"), contexts=[], batches=[], generator=random)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=random)
    merged = StateTransition(spec).eval()
    merged.load_state_dict(merge(network.state_dict()))
    cells, pert = torch.rand(2, 8, 5, generator=random), torch.rand(2, 3, generator=random)
    torch.testing.assert_close(merged(cells, pert).log1p_BSG, network(cells, pert).log1p_BSG)


def test_the_last_layer_learns_when_it_is_named(bench: Bench, plain: Path) -> None:
    adapted = bench.adapt(plain, "last", "adapt.trainable='last'")
    assert changed(plain, adapted) == {"project_out.3.weight", "project_out.3.bias", "context_encoder.weight"}


def test_after_an_interruption_adaptation_ends_as_if_there_had_been_none(
    bench: Bench, plain: Path, adapted: Path
) -> None:
    for step in (5, 7):
        with pytest.raises(KeyboardInterrupt):
            bench.adapt(plain, "stopped", progress=Watcher(step, interrupt))
    again = bench.adapt(plain, "stopped")
    assert changed(adapted, again) == set()
    assert [line["step"] for line in lines(again)] == list(range(1, 10))
    assert [line["step"] for line in lines(again, "val")] == [0, 3, 6, 9]
    watcher = Watcher()
    bench.adapt(plain, "stopped", progress=watcher)
    assert "already adapted" in watcher.notes[-1]


def test_adaptation_that_does_not_help_leaves_the_run_as_it_was(bench: Bench, plain: Path) -> None:
    watcher = Watcher()
    adapted = bench.adapt(plain, "worse", "adapt.learning_rate=5.0", "adapt.patience=2", progress=watcher)
    assert "no step was better" in watcher.notes[-1]
    assert changed(plain, adapted) == {"context_encoder.weight"}
    assert open_run(adapted).step == 0
    assert open_run(adapted).metrics["stopped_early"]
    assert len(lines(adapted)) == 6


def test_another_run_or_way_to_learn_is_refused_in_the_same_folder(bench: Bench, plain: Path, adapted: Path) -> None:
    with pytest.raises(CheckpointError, match="trainable: the run was begun with 'context,bias'"):
        bench.adapt(plain, adapted.name, "adapt.trainable='bias'")


def parts_of(bench: Bench, run: Path, out: str, overrides: Sequence[str] = ()) -> ad.AnnData:
    targets = bench.folder / "targets.csv"
    targets.write_text("target_gene,n_cells,median_umi_per_cell\nG1,10,500\nG3,12,500\n")
    rules = ["num_genes=20", "num_targets=2", "max_cells=60"]
    given = [f"submission.targets={str(targets)!r}", *(f"submission.rules.{rule}" for rule in rules)]
    parts = generate(run, bench.folder / out, overrides=[*given, *overrides])
    return ad.read_h5ad(next(parts.glob("*/G3.h5ad")))


def test_generation_takes_the_adapted_run_and_makes_cells_of_the_new_line(bench: Bench, adapted: Path) -> None:
    cells = parts_of(bench, adapted, "parts")
    assert cells.shape == (12, 20)
    assert set(cells.obs["batch"]) == {"b2", "b9"}
    assert (bench.folder / "parts" / "K2").is_dir()


def test_a_run_that_reads_variable_genes_reads_its_own_from_the_new_line(bench: Bench) -> None:
    run = bench.train("hvg", "model.input='hvg'", "model.output='hvg'")
    adapted = open_run(bench.adapt(run, "hvg_adapted"))
    trained, store = open_run(run), Store.open(adapted.store_path)
    assert adapted.hvg.tolist() == trained.hvg.tolist() != store.hvg.tolist()
    cells = parts_of(bench, adapted.path, "hvg_parts", ["generate.unpredicted_genes='control'"])
    assert np.isfinite(cells.X.toarray()).all()
    network, rows = adapted.model(), store.rows(split=Split.TRAIN, pert=store.control_code)
    feature = torch.from_numpy(open_features(adapted.path / "features").of(["G3"]))
    with torch.no_grad():
        anew = network(
            torch.from_numpy(store.log1p(rows, genes=trained.hvg))[None, :8], feature, None, torch.tensor([2])
        )
    assert anew.log1p_BSG.shape == (1, 8, 8)
    wrong = network(torch.from_numpy(store.log1p(rows, genes=store.hvg))[None, :8], feature, None, torch.tensor([2]))
    means = [value.log1p_BSG.mean((0, 1)).detach().numpy() for value in (anew, wrong)]
    found = cells.X.toarray()[:, trained.hvg].mean(0)
    assert np.abs(found - means[0]).mean() < np.abs(found - means[1]).mean()


def test_what_does_not_fit_is_refused_with_every_problem(bench: Bench, plain: Path, tmp_path: Path) -> None:
    other = Bench(tmp_path)
    write_small_h5ad(tmp_path / "line.h5ad", genes=SMALL_GENES[::-1], contexts=("K2",), batches=("b2", "b9"))
    with pytest.raises(DataError, match="position 0: expected 'G0', got 'G19'"):
        other.adapt(plain, "out")
    write_small_h5ad(tmp_path / "line.h5ad", perts=("non-targeting", "G1", "G3", "G7"), contexts=("K2",))
    with pytest.raises(DataError, match="'G7': it has no feature"):
        other.adapt(plain, "out")
    write_small_h5ad(tmp_path / "line.h5ad", contexts=("K2",))
    with pytest.raises(DataError, match="normalised to"):
        other.adapt(plain, "out", "prepare.target_sum=77.0")
    with pytest.raises(ConfigError, match="trained with 16, got 32"):
        other.adapt(plain, "out", "model.hidden=32")
    with pytest.raises(ConfigError, match="no batch embedding"):
        other.adapt(plain, "out", "adapt.trainable='batch'")
    with pytest.raises(ConfigError, match="without a DE head"):
        other.adapt(plain, "out", "loss.de=0.5", "loss.de_head=learned")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "contexts", "lora", "lora:0", "bias,lora:x"])
def test_words_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected offset, context, batch, bias, last, gain or lora:R"):
        parse_learn(text)


def test_features_of_new_targets_come_from_the_file_of_the_training(bench: Bench, tmp_path: Path) -> None:
    names = np.array(SMALL_GENES)
    np.savez(tmp_path / "features.npz", gene=names, embedding=np.eye(20, 8, dtype=np.float32))
    given = ["features.kind='file'", f"features.path={str(tmp_path / 'features.npz')!r}"]
    run = bench.train("filed", *given)
    other = Bench(tmp_path)
    write_small_h5ad(tmp_path / "line.h5ad", perts=("non-targeting", "G1", "G3", "G7"), contexts=("K2",))
    adapted: Run = open_run(other.adapt(run, "out"))
    assert "G7" in adapted.perts
    assert parts_of(other, adapted.path, "parts").shape == (12, 20)
    np.savez(tmp_path / "features.npz", gene=names, embedding=2 * np.eye(20, 8, dtype=np.float32))
    with pytest.raises(CheckpointError, match="other features than it was trained with"):
        other.adapt(run, "out2")


ON_MEAN = ("model.residual='shift'", "model.base='mean'")


@pytest.fixture(scope="module")
def on_mean(bench: Bench) -> Path:
    """A network on the mean effect of the lines that it was trained on."""
    return bench.train("on_mean", *ON_MEAN, "train.steps=30", "train.learning_rate=0.02")


def line_effects(store: Store) -> dict[str, np.ndarray]:
    """The line's training effects, cell by cell."""
    found = {}
    controls = store.log1p(store.rows(split=Split.TRAIN, pert=store.control_code)).mean(0, dtype=np.float64)
    for code, name in enumerate(store.perts):
        rows = store.rows(split=Split.TRAIN, pert=code)
        if name != store.control and len(rows):
            found[name] = store.log1p(rows).mean(0, dtype=np.float64) - controls
    return found


def test_a_baseline_that_a_network_stands_on_is_refitted_with_the_line(bench: Bench, on_mean: Path) -> None:
    watcher = Watcher()
    adapted = open_run(bench.adapt(on_mean, "on_mean_adapted", progress=watcher))
    assert any("refitted with 2 training effects" in note for note in watcher.notes)
    before, after = open_run(on_mean).baseline(), adapted.baseline()
    assert before is not None
    assert after is not None
    effects = line_effects(Store.open(adapted.store_path))
    assert set(effects) == {"G1", "G2"}
    np.testing.assert_allclose(after.mean_CG[2], np.mean(list(effects.values()), axis=0), atol=1e-5)
    np.testing.assert_array_equal(after.mean_CG[:2], before.mean_CG[:2])
    assert changed(on_mean, adapted.path) <= LEARNT
    assert np.isfinite(parts_of(bench, adapted.path, "on_mean_parts").X.toarray()).all()


def test_a_line_with_one_training_target_stands_on_the_other_lines(bench: Bench, on_mean: Path, tmp_path: Path) -> None:
    other = Bench(tmp_path)
    write_small_h5ad(tmp_path / "line.h5ad", perts=("non-targeting", "G1", "G3"), contexts=("K2",))
    adapted = open_run(other.adapt(on_mean, "out"))
    before, after = open_run(on_mean).baseline(), adapted.baseline()
    assert before is not None
    assert after is not None
    np.testing.assert_allclose(after.mean_CG[2], before.mean_CG[-1], atol=1e-6)


def test_a_gain_alone_takes_no_steps_and_meets_the_line_s_mean_effect(
    bench: Bench, on_mean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pertcast.train.closed_form, "least_squares_gain", lambda *_: 0.25)
    adapted = open_run(bench.adapt(on_mean, "gained", "adapt.trainable='gain'"))
    assert changed(on_mean, adapted.path) == {"project_out.3.weight", "project_out.3.bias", "context_encoder.weight"}
    before, after = (load_file(run / "weights.safetensors") for run in (on_mean, adapted.path))
    assert adapted.metrics["gain"] == 0.25
    torch.testing.assert_close(after["project_out.3.weight"], 0.25 * before["project_out.3.weight"])
    assert adapted.step == 0
    assert adapted.metrics["num_learning"] == 1 + len(SMALL_GENES)
    store = Store.open(adapted.store_path)
    rows = store.rows(split=Split.TRAIN, pert=store.control_code)
    baseline, network = adapted.baseline(), adapted.model()
    assert baseline is not None
    predicted = []
    for name in ("G1", "G2"):
        feature = torch.from_numpy(open_features(adapted.path / "features").of([name]))
        base = torch.from_numpy(baseline.mean_CG[2:3])
        with torch.no_grad():
            cells = network(torch.from_numpy(store.log1p(rows))[None], feature, None, torch.tensor([2]), base)
        predicted.append(cells.unclipped_BSG[0].mean(0).numpy() - store.log1p(rows).mean(0))
    wanted = np.mean(list(line_effects(store).values()), axis=0)
    np.testing.assert_allclose(np.mean(predicted, axis=0), wanted, atol=0.05)
    start = np.abs(np.mean(predicted, axis=0) - wanted).mean()
    assert start < 0.3 * np.abs(wanted).mean()


def test_a_counts_head_goes_with_the_run_and_needs_the_run_to_have_one(bench: Bench, plain: Path) -> None:
    run = bench.train("headed", "loss.nb=1")
    assert changed(run, bench.adapt(run, "headed_adapted", "loss.energy=1", "loss.nb=1")) <= LEARNT
    with pytest.raises(ConfigError, match="without a counts head"):
        bench.adapt(plain, "headless", "loss.nb=1")


def test_a_gain_is_that_of_plain_least_squares_and_the_offset_that_of_a_search() -> None:
    random = np.random.default_rng(0)
    shift, asked = random.normal(size=(2, 4, 30))
    asked += 0.6 * shift + 5
    own, theirs = shift - shift.mean(0), asked - asked.mean(0)
    slow = np.linalg.lstsq(own.reshape(-1, 1), theirs.ravel(), rcond=None)[0][0]
    assert least_squares_gain(torch.from_numpy(shift), torch.from_numpy(asked)) == pytest.approx(slow)
    assert least_squares_gain(torch.from_numpy(shift), torch.from_numpy(-asked)) == 0
    assert least_squares_gain(torch.from_numpy(shift), torch.from_numpy(9 * asked)) == 1
    assert least_squares_gain(torch.zeros(1, 3), torch.ones(1, 3)) == 1
    cells, weights = torch.from_numpy(random.normal(size=(50, 3))), torch.from_numpy(random.dirichlet(np.ones(50)))
    wanted = torch.tensor([0.0, 0.2, 3.0], dtype=torch.float64)
    moved = (cells + offset_of(cells, weights, wanted)).clamp_min(0)
    np.testing.assert_allclose(weights @ moved, wanted, atol=1e-6)


def test_a_gain_needs_a_network_that_adds_to_control_cells(bench: Bench, plain: Path) -> None:
    with pytest.raises(ConfigError, match="remove gain from"):
        bench.adapt(plain, "no_gain", "adapt.trainable='gain,bias'")


def test_a_baseline_alone_is_not_adapted(bench: Bench) -> None:
    run = bench.train("only_mean", "model.kind='mean'")
    with pytest.raises(CheckpointError, match="it is a baseline"):
        bench.adapt(run, "only_mean_adapted")
