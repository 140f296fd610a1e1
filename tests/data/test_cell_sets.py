"""Cell sets: what must always hold of them, on made-up tables and on a real store."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertcast.config import Experiment
from pertcast.data.cell_sets import CellSets, Match, generation_sets, training_sets
from pertcast.data.prepare import prepare
from pertcast.data.split import Split
from pertcast.data.store import Store
from pertcast.errors import DataError

TRAIN, VAL = Split.TRAIN, Split.VAL


@dataclass(frozen=True)
class Table:
    pert_codes: np.ndarray
    context_codes: np.ndarray
    batch_codes: np.ndarray
    split: np.ndarray
    perts: tuple[str, ...]
    contexts: tuple[str, ...]
    file_codes: np.ndarray
    files: tuple[str, ...]
    dataset_of_file: tuple[int, ...]
    control_code: int = 0

    @property
    def screen_codes(self) -> np.ndarray:
        datasets = np.array(self.dataset_of_file)[self.file_codes]
        codes: np.ndarray = (datasets * len(self.contexts) + self.context_codes).astype(np.int32)
        return codes


def make_table(
    *,
    num_cells: int,
    num_perts: int = 3,
    num_contexts: int = 2,
    num_batches: int = 3,
    num_files: int = 1,
    seed: int = 0,
) -> Table:
    """Random codes; every screen has control cells of both splits, some cells have no known batch.

    Two files make a dataset, so that a file may lack controls that its dataset has.
    """
    rng = np.random.default_rng(seed)
    pert = rng.integers(num_perts, size=num_cells)
    context = rng.integers(num_contexts, size=num_cells)
    split = rng.choice([TRAIN, VAL], size=num_cells)
    file = rng.integers(num_files, size=num_cells)
    sure = [(c, s, f) for c in range(num_contexts) for s in (TRAIN, VAL) for f in range(0, num_files, 2)]
    pert = np.concatenate([pert, np.zeros(len(sure), dtype=int)])
    context = np.concatenate([context, [c for c, _, _ in sure]])
    split = np.concatenate([split, [s for _, s, _ in sure]])
    file = np.concatenate([file, [f for _, _, f in sure]]).astype(np.int32)
    batch = rng.integers(-1, num_batches, size=len(pert))
    order = rng.permutation(len(pert))
    return Table(
        pert[order].astype(np.int32),
        context[order].astype(np.int32),
        batch.astype(np.int32),
        split[order].astype(np.uint8),
        tuple(f"P{i}" for i in range(num_perts)),
        tuple(f"C{i}" for i in range(num_contexts)),
        file[order],
        tuple(f"F{i}" for i in range(num_files)),
        tuple(i // 2 for i in range(num_files)),
    )


tables = st.builds(
    make_table,
    num_cells=st.integers(0, 150),
    num_perts=st.integers(1, 5),
    num_contexts=st.integers(1, 3),
    num_batches=st.integers(1, 6),
    num_files=st.integers(1, 5),
    seed=st.integers(0, 10_000),
)


def cut(table: Table, *, set_size: int = 4, seed: int = 0, epoch: int = 0, match: Match = "batch") -> CellSets:
    return training_sets(table, set_size=set_size, seed=seed, epoch=epoch, split=TRAIN, match=match, control_sets=True)


Group = tuple[int, int, int]


def groups_of(table: Table, split: int = TRAIN) -> dict[Group, set[int]]:
    """The obvious twin: rows of each (file, context, pert) of the split, one cell at a time."""
    groups: dict[Group, set[int]] = {}
    for row in range(len(table.split)):
        if table.split[row] & split:
            key = (int(table.file_codes[row]), int(table.context_codes[row]), int(table.pert_codes[row]))
            groups.setdefault(key, set()).add(row)
    return groups


def allowed_controls(table: Table, row: int, match: Match) -> tuple[str, set[int]]:
    """The obvious twin: the narrowest pool that has a control for a cell, other than itself, and its name."""
    file, context = table.file_codes[row], table.context_codes[row]
    everywhere = {
        other
        for other in range(len(table.split))
        if table.split[other] & TRAIN and table.pert_codes[other] == 0 and table.context_codes[other] == context
    }
    in_file = {other for other in everywhere if table.file_codes[other] == file}
    pools = {
        "batch": {other for other in in_file if table.batch_codes[other] == table.batch_codes[row] >= 0},
        "file": in_file,
        "dataset": {other for other in everywhere if table.screen_codes[other] == table.screen_codes[row]},
        "anywhere": everywhere,
    }
    if match == "context":
        del pools["batch"]
    for name, pool in pools.items():
        if pool - {row}:
            return name, pool - {row}
        if name == "dataset" and pool:
            return name, pool
    raise AssertionError(row)


@settings(deadline=None)
@given(tables, st.integers(1, 12), st.sampled_from(["batch", "context"]))
def test_every_cell_of_a_group_appears_and_none_twice_in_a_set(table: Table, set_size: int, match: Match) -> None:
    sets = cut(table, set_size=set_size, match=match)
    groups = groups_of(table)
    seen: dict[Group, set[int]] = {}
    num_sets: Counter[Group] = Counter()
    for pert, context, screen, rows in zip(sets.pert, sets.context, sets.screen, sets.pert_rows.tolist(), strict=True):
        key = (int(table.file_codes[rows[0]]), int(context), int(pert))
        assert set(rows) <= groups[key]
        assert {int(table.screen_codes[row]) for row in rows} == {int(screen)}
        assert max(Counter(rows).values()) <= -(-set_size // len(groups[key]))
        seen.setdefault(key, set()).update(rows)
        num_sets[key] += 1
    assert seen == groups
    assert num_sets == {key: -(-len(group) // set_size) for key, group in groups.items()}
    assert sets.num_repeating == sum(len(group) < set_size for group in groups.values())


@settings(deadline=None)
@given(tables, st.integers(1, 12), st.sampled_from(["batch", "context", "all_datasets"]))
def test_a_control_is_of_the_cells_own_batch_file_or_dataset(table: Table, set_size: int, match: Match) -> None:
    sets = cut(table, set_size=set_size, match=match)
    used: dict[str, set[int]] = {"batch": set(), "file": set(), "dataset": set(), "anywhere": set()}
    for row, control in zip(sets.pert_rows.ravel().tolist(), sets.control_rows.ravel().tolist(), strict=True):
        name, pool = allowed_controls(table, row, match)
        assert control in pool
        used[name].add(row)
    assert sets.num_other_batch == (0 if match == "context" else len(used["file"]))
    assert (sets.num_other_file, sets.num_other_dataset) == (len(used["dataset"]), 0)


def test_controls_of_another_dataset_are_used_only_if_asked_for() -> None:
    table = make_table(num_cells=300, num_contexts=1, num_files=4)
    codes = np.where((table.file_codes >= 2) & (table.pert_codes == 0), 1, table.pert_codes)
    lacking = replace(table, pert_codes=codes)
    with pytest.raises(DataError, match="no control cell") as caught:
        cut(lacking)
    assert [problem.place for problem in caught.value.problems] == ["F2, context 'C0'", "F3, context 'C0'"]
    assert all('train.match = "all_datasets"' in problem.remedy for problem in caught.value.problems)
    sets = cut(lacking, match="all_datasets")
    assert set(lacking.file_codes[sets.control_rows].ravel().tolist()) == {0, 1}
    assert sets.num_other_dataset == int(((lacking.file_codes >= 2) & (lacking.split == TRAIN)).sum()) > 0


@settings(deadline=None)
@given(tables, st.integers(1, 12))
def test_controls_of_the_file_do_not_repeat_in_a_set(table: Table, set_size: int) -> None:
    sets = cut(table, set_size=set_size, match="context")
    groups = groups_of(table)
    for rows, controls in zip(sets.pert_rows.tolist(), sets.control_rows.tolist(), strict=True):
        own = groups.get((int(table.file_codes[rows[0]]), int(table.context_codes[rows[0]]), 0), set())
        if len(own) > 1:
            assert max(Counter(controls).values()) <= -(-set_size // len(own))


def test_controls_of_a_batch_do_not_repeat_in_a_set_while_it_has_enough() -> None:
    table = make_table(num_cells=3000, num_contexts=1, num_batches=4)
    table = replace(table, batch_codes=np.abs(table.batch_codes))
    sets = cut(table, set_size=32)
    for rows in sets.control_rows:
        assert len(set(rows.tolist())) == 32


def test_control_cells_that_alternate_between_batches_meet_all_of_their_batch() -> None:
    zeros = np.zeros(12, dtype=np.int32)
    table = Table(
        pert_codes=zeros, context_codes=zeros, batch_codes=np.arange(12, dtype=np.int32) % 2,
        split=np.full(12, TRAIN, dtype=np.uint8), perts=("control",), contexts=("K562",), file_codes=zeros,
        files=("a.h5ad",), dataset_of_file=(0,),
    )  # fmt: skip
    for seed in range(5):
        sets = cut(table, set_size=12, seed=seed)
        assert np.array_equal(sets.pert_rows % 2, sets.control_rows % 2)
        # one that would have met itself takes the next
        assert len(set(sets.control_rows.ravel().tolist())) >= 10


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
    assert [problem.place for problem in caught.value.problems] == ["F0, context 'C1'", "F0, context 'C2'"]
    assert all(problem.remedy for problem in caught.value.problems)


def test_slicing_keeps_the_order_and_the_counts() -> None:
    sets = cut(make_table(num_cells=100))
    part = sets[2:5]
    assert len(part) == 3
    np.testing.assert_array_equal(part.pert_rows, sets.pert_rows[2:5])
    assert part.num_other_batch == sets.num_other_batch > 0


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
    assert trained.num_other_batch == trained.num_other_file == trained.num_repeating == 0
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
