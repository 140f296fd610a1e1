"""Cell sets: what must always hold of them, on made-up tables and on a real store."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertcast.config import Experiment
from pertcast.data.sets import CellSets, generation_sets, training_sets
from pertcast.data.split import Split
from pertcast.data.store import Store, prepare
from pertcast.errors import DataError

TRAIN, VAL = Split.TRAIN, Split.VAL
Match = Literal["batch", "context"]


@dataclass(frozen=True)
class Table:
    pert_codes: np.ndarray
    context_codes: np.ndarray
    batch_codes: np.ndarray
    split: np.ndarray
    perts: tuple[str, ...]
    contexts: tuple[str, ...]
    control_code: int = 0


def make_table(
    *, num_cells: int, num_perts: int = 3, num_contexts: int = 2, num_batches: int = 3, seed: int = 0
) -> Table:
    """Random codes; every context has control cells of both splits, some cells have no known batch."""
    rng = np.random.default_rng(seed)
    pert = rng.integers(num_perts, size=num_cells)
    context = rng.integers(num_contexts, size=num_cells)
    split = rng.choice([TRAIN, VAL], size=num_cells)
    sure = [(c, s) for c in range(num_contexts) for s in (TRAIN, VAL)]
    pert = np.concatenate([pert, np.zeros(len(sure), dtype=int)])
    context = np.concatenate([context, [c for c, _ in sure]])
    split = np.concatenate([split, [s for _, s in sure]])
    batch = rng.integers(-1, num_batches, size=len(pert))
    order = rng.permutation(len(pert))
    return Table(
        pert[order].astype(np.int32),
        context[order].astype(np.int32),
        batch.astype(np.int32),
        split[order].astype(np.uint8),
        tuple(f"P{i}" for i in range(num_perts)),
        tuple(f"C{i}" for i in range(num_contexts)),
    )


tables = st.builds(
    make_table,
    num_cells=st.integers(0, 150),
    num_perts=st.integers(1, 5),
    num_contexts=st.integers(1, 3),
    num_batches=st.integers(1, 6),
    seed=st.integers(0, 10_000),
)


def cut(table: Table, *, set_size: int = 4, seed: int = 0, epoch: int = 0, match: Match = "batch") -> CellSets:
    return training_sets(table, set_size=set_size, seed=seed, epoch=epoch, split=TRAIN, match=match, control_sets=True)


def groups_of(table: Table, split: int = TRAIN) -> dict[tuple[int, int], set[int]]:
    """The obvious twin: rows of each (context, pert) of the split, one cell at a time."""
    groups: dict[tuple[int, int], set[int]] = {}
    for row in range(len(table.split)):
        if table.split[row] & split:
            key = (int(table.context_codes[row]), int(table.pert_codes[row]))
            groups.setdefault(key, set()).add(row)
    return groups


@settings(deadline=None)
@given(tables, st.integers(1, 12), st.sampled_from(["batch", "context"]))
def test_every_cell_of_a_group_appears_and_none_twice_in_a_set(table: Table, set_size: int, match: Match) -> None:
    sets = cut(table, set_size=set_size, match=match)
    groups = groups_of(table)
    seen: dict[tuple[int, int], set[int]] = {}
    num_sets: Counter[tuple[int, int]] = Counter()
    for pert, context, rows in zip(sets.pert.tolist(), sets.context.tolist(), sets.pert_rows.tolist(), strict=True):
        group = groups[context, pert]
        assert set(rows) <= group
        assert max(Counter(rows).values()) <= -(-set_size // len(group))
        seen.setdefault((context, pert), set()).update(rows)
        num_sets[context, pert] += 1
    assert seen == groups
    assert num_sets == {key: -(-len(group) // set_size) for key, group in groups.items()}
    assert sets.num_repeating == sum(len(group) < set_size for group in groups.values())


@settings(deadline=None)
@given(tables, st.integers(1, 12))
def test_controls_are_of_the_context_split_and_batch(table: Table, set_size: int) -> None:
    sets = cut(table, set_size=set_size)
    groups = groups_of(table)
    unmatched = set()
    for context, pert, rows, controls in zip(
        sets.context.tolist(), sets.pert.tolist(), sets.pert_rows.tolist(), sets.control_rows.tolist(), strict=True
    ):
        pool = groups[context, 0]
        for row, control in zip(rows, controls, strict=True):
            assert control in pool
            own_batch = {c for c in pool if table.batch_codes[c] == table.batch_codes[row] >= 0}
            if own_batch - {row}:
                assert control in own_batch
            else:
                unmatched.add(row)
            if pert == 0:
                assert control != row or len(pool) == 1
    assert sets.num_unmatched == len(unmatched)


@settings(deadline=None)
@given(tables, st.integers(1, 12))
def test_controls_of_the_context_do_not_repeat_in_a_set(table: Table, set_size: int) -> None:
    sets = cut(table, set_size=set_size, match="context")
    groups = groups_of(table)
    assert sets.num_unmatched == 0
    for context, controls in zip(sets.context.tolist(), sets.control_rows.tolist(), strict=True):
        assert max(Counter(controls).values()) <= -(-set_size // len(groups[context, 0]))


def test_controls_of_a_batch_do_not_repeat_in_a_set_while_it_has_enough() -> None:
    table = make_table(num_cells=3000, num_contexts=1, num_batches=4)
    table = replace(table, batch_codes=np.abs(table.batch_codes))
    sets = cut(table, set_size=32)
    for rows in sets.control_rows:
        assert len(set(rows.tolist())) == 32


@settings(deadline=None)
@given(tables, st.integers(0, 5), st.integers(0, 5))
def test_the_same_seed_and_epoch_give_the_same_sets(table: Table, seed: int, epoch: int) -> None:
    first, second = (cut(table, seed=seed, epoch=epoch) for _ in range(2))
    for name in ("pert", "context", "pert_rows", "control_rows"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_another_seed_or_epoch_gives_other_sets() -> None:
    table = make_table(num_cells=400)
    first = cut(table)
    for other in (cut(table, seed=1), cut(table, epoch=1)):
        assert first.pert_rows.shape == other.pert_rows.shape
        assert (first.pert_rows != other.pert_rows).mean() > 0.5
        assert (first.control_rows != other.control_rows).mean() > 0.5


def test_sets_of_one_target_do_not_depend_on_other_targets() -> None:
    table = make_table(num_cells=400, num_perts=4)
    kept = np.isin(table.pert_codes, [0, 2])
    alone = replace(table, split=np.where(kept, table.split, 0).astype(np.uint8))
    every, fewer = cut(table), cut(alone)

    def of_target(sets: CellSets) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
        some = sets.pert == 2
        pairs = zip(sets.pert_rows[some].tolist(), sets.control_rows[some].tolist(), strict=True)
        return {(tuple(rows), tuple(controls)) for rows, controls in pairs}

    assert of_target(every) == of_target(fewer) != set()


def test_control_sets_can_be_left_out() -> None:
    table = make_table(num_cells=200)
    sets = training_sets(table, set_size=4, seed=0, epoch=0, split=VAL, match="context", control_sets=False)
    assert 0 not in sets.pert
    assert {int(p) for p in sets.pert} == {1, 2}
    assert np.all(table.split[sets.pert_rows] == VAL)
    assert np.all(table.split[sets.control_rows] == VAL)


def test_a_split_without_cells_gives_no_sets() -> None:
    table = make_table(num_cells=50)
    sets = training_sets(table, set_size=4, seed=0, epoch=0, split=Split.TEST, match="batch", control_sets=True)
    assert len(sets) == 0
    assert sets.pert_rows.shape == sets.control_rows.shape == (0, 4)


def test_contexts_without_controls_are_all_named() -> None:
    table = make_table(num_cells=100, num_contexts=3)
    codes = np.where((table.context_codes > 0) & (table.pert_codes == 0), 1, table.pert_codes)
    broken = replace(table, pert_codes=codes)
    with pytest.raises(DataError, match=r"no control cell") as caught:
        cut(broken)
    assert [problem.place for problem in caught.value.problems] == ["context 'C1'", "context 'C2'"]
    assert all(problem.remedy for problem in caught.value.problems)


def test_slicing_keeps_the_order_and_the_counts() -> None:
    sets = cut(make_table(num_cells=100))
    part = sets[2:5]
    assert len(part) == 3
    np.testing.assert_array_equal(part.pert_rows, sets.pert_rows[2:5])
    assert part.num_unmatched == sets.num_unmatched


def test_set_order_is_shuffled() -> None:
    sets = cut(make_table(num_cells=2000, num_perts=6))
    assert (np.diff(sets.pert) != 0).mean() > 0.5


def test_two_hundred_thousand_cells_are_cut_in_well_under_a_second() -> None:
    table = make_table(num_cells=200_000, num_perts=150, num_contexts=1, num_batches=48)
    start = time.perf_counter()
    sets = cut(table, set_size=128)
    assert time.perf_counter() - start < 1.0
    assert len(sets) > 700


def test_a_real_store_is_cut_by_its_codes(small_h5ad: Callable[..., Path], tmp_path: Path) -> None:
    path = small_h5ad(contexts=("H1", "K562"), cells_per_group=20)
    experiment = Experiment.model_validate(
        {
            "datasets": {"d": str(path)},
            "training": {"d": "train"},
            "columns": {"cell_type": "cell_type", "batch": "batch"},
            "fewshot": {"d.K562": {"val": ("G2",)}},
        }
    )
    store = Store.open(prepare(experiment, tmp_path / "store"))
    trained = training_sets(store, set_size=8, seed=0, epoch=0, split=Split.TRAIN, match="batch", control_sets=True)
    groups = {(store.contexts[c], store.perts[p]) for c, p in zip(trained.context, trained.pert, strict=True)}
    every = {(c, p) for c in ("H1", "K562") for p in ("non-targeting", "G1", "G2", "G3")}
    assert groups == every - {("K562", "G2")}
    assert trained.num_unmatched == trained.num_repeating == 0
    np.testing.assert_array_equal(store.batch_codes[trained.pert_rows], store.batch_codes[trained.control_rows])
    np.testing.assert_array_equal(store.context_codes[trained.control_rows], trained.context[:, None].repeat(8, 1))
    held = training_sets(store, set_size=8, seed=0, epoch=0, split=Split.VAL, match="batch", control_sets=False)
    assert {(store.contexts[c], store.perts[p]) for c, p in zip(held.context, held.pert, strict=True)} == {
        ("K562", "G2")
    }
    assert not set(held.control_rows.ravel().tolist()) & set(trained.control_rows.ravel().tolist())


pools = st.tuples(st.integers(1, 60), st.integers(1, 5), st.integers(0, 1000))


@settings(deadline=None)
@given(pools, st.integers(1, 100), st.integers(1, 16))
def test_generation_sets_are_full_and_use_the_pool_evenly(
    pool: tuple[int, int, int], num_cells: int, set_size: int
) -> None:
    num_controls, num_batches, seed = pool
    table = make_table(num_cells=num_controls, num_perts=1, num_contexts=1, num_batches=num_batches, seed=seed)
    controls = np.arange(num_controls)
    sets = generation_sets(
        table, context=0, target="P", num_cells=num_cells, set_size=set_size, seed=seed, controls=controls
    )
    assert sets.shape == (-(-num_cells // set_size), set_size)
    used = np.bincount(sets.ravel(), minlength=num_controls)
    assert used.sum() == sets.size
    assert used.max() - used[:num_controls].min() <= 1
    if num_controls >= set_size:
        assert all(len(set(rows)) == set_size for rows in sets.tolist())
    counts = np.bincount(table.batch_codes[controls] + 1, minlength=num_batches + 1)
    lap = sets.ravel()[:num_controls]
    for stop in range(1, len(lap) + 1):
        drawn = np.bincount(table.batch_codes[lap[:stop]] + 1, minlength=num_batches + 1)
        assert np.all(np.abs(drawn - stop * counts / num_controls) < 1 + len(counts) / 2)


def test_generation_sets_of_a_target_do_not_change_when_others_are_asked_for() -> None:
    table = make_table(num_cells=300, num_perts=1, num_contexts=1)
    controls = np.arange(300)

    def draw(target: str, num_cells: int, rows: np.ndarray = controls) -> np.ndarray:
        return generation_sets(table, context=0, target=target, num_cells=num_cells, set_size=8, seed=0, controls=rows)

    alone = draw("A", 40)
    draw("B", 16)
    np.testing.assert_array_equal(draw("A", 40), alone)
    np.testing.assert_array_equal(draw("A", 500)[:5], alone)
    np.testing.assert_array_equal(draw("A", 40, controls[::-1]), alone)
    assert (draw("B", 40) != alone).any()


def test_a_second_lap_has_other_sets() -> None:
    table = make_table(num_cells=64, num_perts=1, num_contexts=1)
    sets = generation_sets(table, context=0, target="A", num_cells=128, set_size=16, seed=0, controls=np.arange(64))
    assert len({frozenset(rows) for rows in sets.tolist()}) == 8


def test_an_empty_pool_is_an_error() -> None:
    table = make_table(num_cells=5, num_contexts=1)
    with pytest.raises(DataError, match=r"'C0': no control cell to generate 'A'"):
        generation_sets(
            table, context=0, target="A", num_cells=1, set_size=2, seed=0, controls=np.empty(0, dtype=np.int64)
        )
