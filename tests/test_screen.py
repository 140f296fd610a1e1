"""The simulated screen that the ladder is measured on: what its docstring promises of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from benchmarks.screen import ScreenConfig, draw_cells, draw_screen, made_up_features
from benchmarks.write_screen import write_screen

from pertcast.config import load_experiment
from pertcast.data.prepare import prepare
from pertcast.data.store import Store

GENES = tuple(f"G{number}" for number in range(160))
FEATURES = made_up_features(GENES[:140])
SMALL = ScreenConfig(num_targets=12, num_genes=120, cells_per_target=20, num_controls=60, umi=400.0)


def test_the_same_seed_draws_the_same_screen_and_another_another() -> None:
    first, again = (draw_screen(GENES, FEATURES, SMALL) for _ in range(2))
    other = draw_screen(GENES, FEATURES, replace(SMALL, seed=1))
    assert first.targets == again.targets != other.targets
    np.testing.assert_array_equal(first.effects_CPG, again.effects_CPG)
    assert (draw_cells(first, SMALL).X != draw_cells(again, SMALL).X).nnz == 0


def test_effects_have_low_rank_and_a_heavy_tail_and_the_own_gene_is_lost() -> None:
    config = replace(SMALL, num_targets=40, rank=3, shared=0.3, limit=1e9)
    screen = draw_screen(GENES, FEATURES, config)
    (effects_PG,) = screen.effects_CPG
    own = [screen.genes.index(target) for target in screen.targets]
    np.testing.assert_allclose(effects_PG[range(40), own], np.log(config.own_gene_left))
    others = np.delete(effects_PG, own, axis=1)
    assert np.linalg.matrix_rank(others, tol=1e-8) == 3 + 1
    sizes = np.sort(np.sqrt(np.square(others).mean(axis=1)))
    assert sizes[-1] > 4 * np.median(sizes)


def test_features_tell_the_direction_of_an_effect_where_they_are_linked() -> None:
    def share_told(linked: float) -> float:
        config = replace(SMALL, num_targets=100, linked=linked, shared=0.0, context_share=0.0)
        screen = draw_screen(GENES, FEATURES, config)
        effects_PG = screen.effects_CPG[0] * (screen.effects_CPG[0] != np.log(config.own_gene_left))
        effects_PG = effects_PG / np.linalg.norm(effects_PG, axis=1, keepdims=True)
        features_PF = np.stack([screen.features[target] for target in screen.targets])
        train, test = slice(0, 70), slice(70, None)
        weights, *_ = np.linalg.lstsq(features_PF[train], effects_PG[train], rcond=None)
        return float(
            1 - np.square(features_PF[test] @ weights - effects_PG[test]).sum() / np.square(effects_PG[test]).sum()
        )

    assert share_told(1.0) > 0.4
    assert share_told(0.0) < 0.1


def test_contexts_share_as_much_of_the_effects_as_asked_for() -> None:
    config = replace(SMALL, contexts=("A", "B"), num_targets=40, shared=0.0)

    def alike(context_share: float) -> float:
        a_PG, b_PG = draw_screen(GENES, FEATURES, replace(config, context_share=context_share)).effects_CPG
        norms = np.linalg.norm(a_PG, axis=1) * np.linalg.norm(b_PG, axis=1)
        return float(np.median((a_PG * b_PG).sum(axis=1) / norms))

    assert alike(0.0) == pytest.approx(1.0)
    assert alike(0.0) > alike(0.5) > alike(1.0)


def test_without_noise_the_mean_is_what_was_expected() -> None:
    config = replace(SMALL, noise="none")
    screen = draw_screen(GENES, FEATURES, config)
    cells = draw_cells(screen, config)
    share_G = screen.share_CG[0] * np.exp(screen.effects_CPG[0, 0])
    mean_G = np.asarray(cells[cells.obs["target_gene"] == screen.targets[0]].X.mean(axis=0)).ravel()
    np.testing.assert_allclose(mean_G, np.log1p(share_G / share_G.sum() * config.umi), rtol=1e-5)


def test_its_experiment_is_prepared_as_it_stands(tmp_path: Path) -> None:
    config = replace(SMALL, contexts=("A", "B"))
    screen = draw_screen(GENES, FEATURES, config)
    path = write_screen(tmp_path, screen, config, num_val=2, num_test=3, held_out_in=["B"])
    experiment = load_experiment(path)
    assert len(experiment.fewshot["screen.B"].val) == 2
    assert len(experiment.fewshot["screen.B"].test) == 3
    store = Store.open(prepare(experiment, tmp_path / "store"))
    assert store.contexts == ("A", "B")
    assert store.num_cells == 2 * (12 * 20 + 60)
    assert ad.read_h5ad(tmp_path / "screen.h5ad").obs["batch"].nunique() == 2 * config.num_batches
