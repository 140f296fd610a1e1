from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from pertcast.cli.app import main
from pertcast.config import RENAMED, RUNGS, LossConfig, load_experiment, rung_overrides, upgrade
from pertcast.data.prepare import prepare
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import ConfigError
from pertcast.models.losses import order_loss
from pertcast.models.run_folder import open_run
from pertcast.models.state import Prediction
from pertcast.progress import SILENT
from pertcast.stats.de import differential_expression
from pertcast.stats.groups import group_cells
from pertcast.train.batches import Batch, blur_features
from pertcast.train.loss_targets import BatchTargets, TrainingTargets, training_targets
from pertcast.train.loss_terms import loss_terms, total_loss, warm_up
from workspace import make_workspace

RECIPES = Path(__file__).parents[2] / "recipes" / "ladder"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    workspace = make_workspace(tmp_path_factory.mktemp("rungs") / "w")
    return Store.open(prepare(load_experiment(workspace.experiment), workspace.folder / "store"))


def test_each_rung_adds_one_term_and_the_first_is_the_default() -> None:
    switched_on = [[name for name, weight in RUNGS[rung].items() if weight] for rung in ("c1", "c2", "c3", "c4")]
    assert switched_on == [["energy"], ["energy", "mae"], ["energy", "mae", "de"], ["energy", "mae", "de", "rank"]]
    assert all(getattr(LossConfig(), name) == weight for name, weight in RUNGS["c1"].items())
    assert rung_overrides(None) == ()


@pytest.mark.parametrize("rung", list(RUNGS))
def test_a_recipe_is_the_first_one_with_its_rung(rung: str) -> None:
    first, own = (tomllib.loads((RECIPES / f"{name}.toml").read_text("utf-8")) for name in ("c1", rung))
    expected = {**LossConfig().model_dump(), **RUNGS[rung]}
    assert {**LossConfig().model_dump(), **own.pop("loss")} == expected
    first.pop("loss")
    assert own == first


def test_a_rung_stands_before_what_is_set_and_is_kept_in_the_run(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "w")
    out = tmp_path / "run"
    arguments = [
        "train",
        str(workspace.experiment),
        "--out",
        str(out),
        "--set",
        "loss.mae=0.25",
        "--set",
        "loss.rank=0",
    ]
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--rung", "c4"])
    loss = open_run(out).experiment["loss"]
    assert (loss["energy"], loss["mae"], loss["de"], loss["rank"]) == (1.0, 0.25, 0.2, 0.0)


@pytest.mark.parametrize("command", ["train", "run"])
def test_a_rung_that_is_not_there_is_refused(command: str, tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "w")
    with pytest.raises(SystemExit):
        main([command, str(workspace.experiment), "--out", str(tmp_path / "out"), "--rung", "c5"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("old", "new"), sorted(RENAMED.items()))
def test_an_earlier_name_is_refused_with_the_new_one_and_read_from_artefacts(
    tmp_path: Path, old: str, new: str
) -> None:
    workspace = make_workspace(tmp_path / "w")
    section, _, key = old.partition(".")
    with pytest.raises(ConfigError, match=f"'{key}' has a new name; write {new}"):
        load_experiment(workspace.experiment, [f"{old}=1"], command="train")
    assert upgrade({section: {key: 1, "other": 2}}) == {section: {new.partition(".")[2]: 1, "other": 2}}


def test_a_loss_of_an_earlier_version_is_read_where_it_means_the_same() -> None:
    assert upgrade({"loss": {"mae": 1.0, "mae_of": "effect"}}) == {"loss": {"mae": 1.0}}
    assert upgrade({"loss": {"mae": 1.0, "mae_of": "set"}}) == {"loss": {"mae": 1.0, "mae_of": "set"}}


def test_auxiliary_weights_rise_over_the_warm_up_and_energy_does_not() -> None:
    config = LossConfig(energy=2.0, mae=1.0, rank=4.0, warmup_steps=4)
    terms = {"energy": torch.tensor(1.0), "mae": torch.tensor(10.0), "rank": torch.tensor(100.0)}
    found = [float(total_loss(terms, config, share=warm_up(config, step))) for step in (0, 1, 3, 9)]
    assert found == [2 + 410 / 4, 2 + 410 / 2, 2 + 410, 2 + 410]
    assert float(total_loss(terms, config)) == 412


def targets_of_store(store: Store) -> TrainingTargets:
    return training_targets(store, np.arange(len(store.genes)), labels=True, progress=SILENT)


def test_the_truth_is_the_means_and_the_official_statistics_of_training_cells(store: Store) -> None:
    truth = targets_of_store(store)
    controls = store.log1p(store.rows(split=Split.TRAIN, pert=store.control_code))
    for pert in range(len(store.perts)):
        targets = truth.of(torch.tensor([0]), torch.tensor([pert]), torch.tensor([0]))
        assert bool(targets.is_control_B) == (pert == store.control_code) != bool(targets.has_effect_B)
        np.testing.assert_allclose(targets.control_mean_BG[0], controls.mean(0), atol=1e-5)
        if pert == store.control_code:
            assert targets.valid_BG is not None
            assert not targets.valid_BG.any()
            continue
        cells = store.log1p(store.rows(split=Split.TRAIN, pert=pert))
        np.testing.assert_allclose(targets.effect_BG[0], cells.mean(0) - controls.mean(0), atol=1e-5)
        groups = [group_cells(values, np.zeros(len(values), dtype=np.int64)) for values in (cells, controls)]
        assert targets.labels_BG is not None
        assert targets.labels_BG[0].tolist() == (differential_expression(*groups).fdr[0] < 0.05).tolist()
        assert store.genes[int(targets.own_gene_B)] == store.perts[pert]
        assert targets.labels_BG[0, targets.own_gene_B]


def test_others_are_of_the_same_context_and_never_the_perturbation_itself(store: Store) -> None:
    truth = targets_of_store(store)
    perts = torch.tensor([pert for pert in range(len(store.perts)) if pert != store.control_code])
    contexts = torch.zeros_like(perts)
    keys = [("train", 3, place) for place in range(len(perts))]
    groups = [(0, pert) for pert in perts.tolist()]
    drawn = truth.draw_others(groups, num=5, seed=0, keys=keys)
    assert drawn.shape == (3, 5)
    targets = truth.of(contexts, perts, contexts)
    for place, rows in enumerate(drawn.tolist()):
        assert rows[2:] == [-1, -1, -1]
        assert len({*rows[:2]}) == 2
        for row in rows[:2]:
            assert not torch.equal(truth.effects_NG[row], targets.effect_BG[place])
    assert torch.equal(drawn, truth.draw_others(groups, num=5, seed=0, keys=keys))
    assert torch.equal(drawn[1:], truth.draw_others(groups[1:], num=5, seed=0, keys=keys[1:]))


def test_held_out_cells_are_never_read_for_the_truth(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    read = Store.csr

    def spy(self: Store, rows: np.ndarray) -> object:
        seen.update(rows.tolist())
        return read(self, rows)

    monkeypatch.setattr(Store, "csr", spy)
    targets_of_store(store)
    assert seen == set(store.rows(split=Split.TRAIN).tolist())
    assert len(seen) < store.num_cells


def test_a_threshold_is_where_a_test_of_means_passes_benjamini_and_hochberg(store: Store) -> None:
    truth = targets_of_store(store)
    controls = store.log1p(store.rows(split=Split.TRAIN, pert=store.control_code)).astype(np.float64)
    spread = np.maximum(controls.std(axis=0), len(controls) ** -0.5)
    for pert in range(len(store.perts)):
        if pert == store.control_code:
            continue
        targets = truth.of(torch.tensor([0]), torch.tensor([pert]), torch.tensor([0]))
        assert targets.labels_BG is not None
        assert targets.threshold_BG is not None
        num_cells = len(store.rows(split=Split.TRAIN, pert=pert))
        standard_error = spread * np.sqrt(1 / num_cells + 1 / len(controls))
        # the largest p-value that passes among as many significant genes
        rank = max(1, int(targets.labels_BG.sum()))
        p_values = 2 * norm.sf(targets.threshold_BG[0].numpy() / standard_error)
        np.testing.assert_allclose(p_values, 0.05 * rank / len(store.genes), rtol=1e-3)


def make_targets(store: Store, **changed: Any) -> BatchTargets:
    pert = next(code for code in range(len(store.perts)) if code != store.control_code)
    codes = torch.tensor([pert, pert, store.control_code])
    nothing = torch.zeros(3, dtype=torch.int64)
    return targets_of_store(store).of(nothing, codes, nothing)._replace(**changed)


def make_batch(real_BSG: Tensor) -> Batch:
    nothing = torch.zeros(3, 1)
    codes = torch.zeros(3, dtype=torch.int64)
    return Batch(real_BSG, nothing, codes[:, None], codes, real_BSG, None, codes)


def test_the_mae_of_the_effect_is_of_all_training_cells_and_of_the_set_where_there_are_none(store: Store) -> None:
    genes = len(store.genes)
    real = torch.rand(3, 4, genes, generator=torch.Generator().manual_seed(0))
    pred = torch.rand(3, 4, genes, generator=torch.Generator().manual_seed(1))
    beside = torch.full((3, genes), 0.25)
    targets = make_targets(store, reference_mean_BG=beside)
    found = loss_terms(Prediction(pred, None), make_batch(real), LossConfig(energy=0, mae=1), targets=targets)["mae"]
    for place in (0, 1):
        effect = pred[place].mean(0) - 0.25
        assert float(found[place]) == pytest.approx(float((effect - targets.effect_BG[place]).abs().mean()), rel=1e-5)
    assert float(found[2]) == pytest.approx(float((pred[2].mean(0) - real[2].mean(0)).abs().mean()), rel=1e-5)


def test_the_head_rewards_the_true_effect_over_none_its_half_and_its_opposite(store: Store) -> None:
    targets = make_targets(store, reference_mean_BG=torch.zeros(3, len(store.genes)))
    config = LossConfig(energy=0, de=1)

    def value(share: float) -> float:
        pred = (targets.effect_BG * share)[:, None].expand(-1, 2, -1)
        terms = loss_terms(
            Prediction(pred, None),
            make_batch(pred),
            config,
            targets=targets,
            positive_weight=targets_of_store(store).positive_weight,
        )
        assert terms["de"][2] == 0  # control cells have no label
        return float(terms["de"][0])

    assert value(1.0) < value(0.5) < value(0.0) < value(-1.0)


def test_the_order_is_of_effects_in_two_thresholds_each_set_in_its_own(store: Store) -> None:
    targets = make_targets(store, reference_mean_BG=torch.zeros(3, len(store.genes)))
    assert targets.labels_BG is not None
    assert targets.threshold_BG is not None
    pred = (targets.effect_BG / 2)[:, None].expand(-1, 2, -1)
    found = loss_terms(Prediction(pred, None), make_batch(pred), LossConfig(energy=0, de=1), targets=targets)["de"]
    direction = targets.effect_BG.sign() * targets.labels_BG
    expected = order_loss(targets.effect_BG / 2, direction, 2 * targets.threshold_BG.mean(-1))
    torch.testing.assert_close(found, expected)
    assert (found > 0).tolist() == [True, True, False]


@pytest.mark.parametrize("setting", ["de_form=focal", "de_positive_weight=3"])
def test_what_is_of_single_genes_is_refused_for_the_order(tmp_path: Path, setting: str) -> None:
    workspace = make_workspace(tmp_path / "w")
    with pytest.raises(ConfigError, match="have no effect on the order of genes"):
        load_experiment(workspace.experiment, ["loss.de=0.2", f"loss.{setting}"])
    load_experiment(workspace.experiment, ["loss.de=0.2", f"loss.{setting}", "loss.de_head=learned"])
    # a run that has no such term keeps what it was begun with
    load_experiment(workspace.experiment, [f"loss.{setting}"])


def test_noise_on_features_leaves_control_sets_alone(store: Store) -> None:
    batch = make_batch(torch.zeros(3, 1, 1))._replace(pert_BF=torch.ones(3, 2), pert_B=torch.tensor([0, 5, 5]))
    found = blur_features(batch, torch.full((3, 2), 0.5), control_code=5)
    assert found.pert_BF.tolist() == [[1.5, 1.5], [1.0, 1.0], [1.0, 1.0]]
