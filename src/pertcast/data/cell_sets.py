"""Cell sets: S perturbed cells of one file, context and target, each paired with a control cell.

Invariants: a set never mixes files, contexts, targets or splits. Every cell of a group appears in an epoch. No cell
appears twice in a set unless its group is smaller than a set. The sets of one group depend on no other target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pertcast.data.split import Split
from pertcast.errors import DataError, Problem
from pertcast.stats.draws import generator

Match = Literal["batch", "context", "all_datasets"]

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


class CodedTable(Protocol):
    """The codes of each cell and their names, as in a store; batch -1 is unknown."""

    @property
    def pert_codes(self) -> Int32: ...
    @property
    def context_codes(self) -> Int32: ...
    @property
    def file_codes(self) -> Int32: ...
    @property
    def screen_codes(self) -> Int32: ...
    @property
    def batch_codes(self) -> Int32: ...
    @property
    def split(self) -> NDArray[np.uint8]: ...
    @property
    def perts(self) -> Sequence[str]: ...
    @property
    def contexts(self) -> Sequence[str]: ...
    @property
    def files(self) -> Sequence[str]: ...
    @property
    def control_code(self) -> int: ...


@dataclass(frozen=True)
class CellSets:
    """N sets of S perturbed cells, each cell paired with a control."""

    pert: Int32  # (N,) int32: codes of each set's target, context and screen
    context: Int32
    screen: Int32
    pert_rows: Int64  # (N, S) int64: rows of the store
    control_rows: Int64
    num_repeating: int = 0  # Groups (file, context and target) smaller than a set, whose cells repeat within it
    # Perturbed cells whose control is of another batch of their file, although ``match`` asked for their own;
    # of another file of their dataset; of another dataset
    num_other_batch: int = 0
    num_other_file: int = 0
    num_other_dataset: int = 0

    def __len__(self) -> int:
        """Return N."""
        return len(self.pert)

    def __getitem__(self, item: slice | Int64) -> CellSets:
        """Return some of the sets in order; the counts remain those of the whole epoch."""
        names = ("pert", "context", "screen", "pert_rows", "control_rows")
        return replace(self, **{name: getattr(self, name)[item] for name in names})

    @property
    def groups(self) -> list[tuple[int, int]]:
        """The context and target codes of each set."""
        return list(zip(self.context.tolist(), self.pert.tolist(), strict=True))


@dataclass(frozen=True)
class _Groups:
    """Rows grouped by key: group i is ``rows[starts[i] : starts[i] + counts[i]]``; keys ascend."""

    rows: Int64
    keys: Int64
    starts: Int64
    counts: Int64

    @classmethod
    def of(cls, rows: Int64, keys: Int64) -> _Groups:
        order = np.argsort(keys, kind="stable")
        distinct, starts, counts = np.unique(keys[order], return_index=True, return_counts=True)
        return cls(rows[order], distinct, starts.astype(np.int64), counts.astype(np.int64))

    def find(self, wanted: Int64) -> Int64:
        """Return the group of each key, -1 if there is none."""
        place = np.searchsorted(self.keys, wanted)
        found = np.append(self.keys, -1)[place] == wanted
        return np.where(found & (wanted >= 0), place, -1)

    def take(self, group: Int64, turn: Int64) -> Int64:
        """Return the row at each turn of its group, cyclically."""
        return self.rows[self.starts[group] + turn % self.counts[group]]


def _ranks(keys: Int64) -> Int64:
    """Return the number of equal keys before each position."""
    places = _Groups.of(np.arange(len(keys)), keys)
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[places.rows] = np.arange(len(keys)) - np.repeat(places.starts, places.counts)
    return ranks


def training_sets(
    table: CodedTable, *, set_size: int, seed: int, epoch: int, split: Split, match: Match, control_sets: bool
) -> CellSets:
    """Cut every group of a split into sets of `set_size` cells, each paired with a control, anew in each epoch."""
    num_perts, num_contexts = len(table.perts), len(table.contexts)
    rows = np.flatnonzero((table.split & split) != 0).astype(np.int64)
    file_context = table.file_codes[rows].astype(np.int64) * num_contexts + table.context_codes[rows]
    groups = _Groups.of(rows, file_context * num_perts + table.pert_codes[rows])
    is_control = groups.keys % num_perts == table.control_code

    offsets = np.empty(len(groups.keys), dtype=np.int64)
    for index, key in enumerate(groups.keys.tolist()):
        source, pert = divmod(key, num_perts)
        file, context = divmod(source, num_contexts)
        # the name of the only file does not matter, so that it may be renamed
        names = (table.contexts[context], table.perts[pert], *((table.files[file],) if len(table.files) > 1 else ()))
        random = generator(seed, "sets", epoch, *names)
        random.shuffle(groups.rows[groups.starts[index] :][: groups.counts[index]])
        offsets[index] = random.integers(1 << 40)

    kept = np.flatnonzero(~is_control | control_sets)
    group = np.repeat(kept, -(-groups.counts[kept] // set_size) * set_size)
    turn = _ranks(group)
    pert_rows = groups.take(group, turn)
    control_rows, level = _controls_for(
        table,
        pert_rows,
        controls=groups.rows[np.repeat(is_control, groups.counts)],
        match=match,
        slots=_Slots(group, turn, offsets[group], is_control[group]),
    )
    first = turn < groups.counts[group]
    shuffled = generator(seed, "set order", epoch).permutation(len(group) // set_size)
    pert_rows = pert_rows.reshape(-1, set_size)[shuffled]
    return CellSets(
        pert=table.pert_codes[pert_rows[:, 0]].astype(np.int32),
        context=table.context_codes[pert_rows[:, 0]].astype(np.int32),
        screen=table.screen_codes[pert_rows[:, 0]].astype(np.int32),
        pert_rows=pert_rows,
        control_rows=control_rows.reshape(-1, set_size)[shuffled],
        num_repeating=int((groups.counts[kept] < set_size).sum()),
        num_other_batch=int((first & (level == 1)).sum()) if match != "context" else 0,
        num_other_file=int((first & (level == 2)).sum()),
        num_other_dataset=int((first & (level == 3)).sum()),
    )


class _Slots(NamedTuple):
    """The positions that need a control: group, turn, start of the group, and whether it is of controls."""

    group: Int64
    turn: Int64
    offset: Int64
    own: NDArray[np.bool_]


def _pool_keys(table: CodedTable, rows: Int64, level: int) -> Int64:
    """Return the pool of each row: its batch at level 0 (-1 if unknown), then its file, screen and context."""
    context = table.context_codes[rows].astype(np.int64)
    in_file = table.file_codes[rows].astype(np.int64) * len(table.contexts) + context
    if level == 0:
        batch = table.batch_codes[rows].astype(np.int64)
        return np.where(batch < 0, -1, (in_file << 32) | batch)
    return (in_file, table.screen_codes[rows].astype(np.int64), context)[level - 1]


def _controls_for(
    table: CodedTable, pert_rows: Int64, *, controls: Int64, match: Match, slots: _Slots
) -> tuple[Int64, NDArray[np.int64]]:
    """Return a control for each slot, and the level of the pool that it came from (see :func:`_pool_keys`)."""
    result = np.full(len(pert_rows), -1, dtype=np.int64)
    level_of = np.full(len(pert_rows), -1, dtype=np.int64)
    for level in {"batch": (0, 1, 2), "context": (1, 2), "all_datasets": (0, 1, 2, 3)}[match]:
        keys = _pool_keys(table, controls, level)
        pools = _Groups.of(controls[keys >= 0], keys[keys >= 0])
        open_slots = np.flatnonzero(result < 0)
        pool = pools.find(_pool_keys(table, pert_rows[open_slots], level))
        # a control that is alone in its batch or file would be paired with itself
        found: NDArray[np.bool_] = np.append(pools.counts, 0)[pool] > (slots.own[open_slots] & (level < 2))
        taken, pool = open_slots[found], pool[found]
        some = _Slots(slots.group[taken], slots.turn[taken], slots.offset[taken], slots.own[taken])
        rank = _ranks(some.group * max(len(pools.keys), 1) + pool)
        turn = np.where(some.own & (level == 1), some.turn, rank) + _start(pools.counts[pool], some)
        itself = pools.take(pool, turn) == pert_rows[taken]
        result[taken] = pools.take(pool, turn + itself)
        level_of[taken] = level
    if (result < 0).any():
        lacking = sorted({_source(table, row) for row in pert_rows[result < 0].tolist()})
        remedy = (
            "correct columns.control, or give the split some controls (prepare.val_controls, prepare.test_controls)"
        )
        if match != "all_datasets":
            remedy += ', or borrow controls of other datasets with train.match = "all_datasets"'
        message = "perturbed cells in this split, and no control cell in their dataset"
        raise DataError(problems=[Problem(place, message, remedy) for place in lacking])
    return result, level_of


def _source(table: CodedTable, row: int) -> str:
    return f"{table.files[table.file_codes[row]]}, context {table.contexts[table.context_codes[row]]!r}"


def _start(size: Int64, slots: _Slots) -> Int64:
    """Return where a group starts in its pool: anywhere, but not at itself for control cells."""
    return np.where(slots.own & (size > 1), 1 + slots.offset % np.maximum(size - 1, 1), slots.offset % size)


def generation_sets(
    table: CodedTable, *, context: int, target: str, num_cells: int, set_size: int, seed: int, controls: Int64
) -> Int64:
    """Draw the control cells from which the cells of one target are generated."""
    name = table.contexts[context]
    pool = np.unique(np.asarray(controls, dtype=np.int64))
    if not len(pool):
        raise DataError(
            f"context {name!r}: no control cell to generate {target!r} from; correct columns.control, or take control "
            'cells of every split (generate.controls_from = "all")'
        )
    num_sets = -(-num_cells // set_size)
    random = generator(seed, "generate", name, target)
    strata = _Groups.of(pool, table.batch_codes[pool].astype(np.int64))
    drawn = np.empty(0, dtype=np.int64)
    while len(drawn) < num_sets * set_size:
        stratum = np.repeat(np.arange(len(strata.counts)), strata.counts)
        shuffled = strata.rows[np.lexsort((random.random(len(stratum)), stratum))]
        rank = np.arange(len(stratum)) - strata.starts[stratum]
        lap = shuffled[np.argsort((rank + random.random(len(stratum))) / strata.counts[stratum], kind="stable")]
        begun = drawn[len(drawn) - len(drawn) % set_size :]
        late = np.isin(lap, begun)
        drawn = np.concatenate([drawn, lap[~late], lap[late]])
    return drawn[: num_sets * set_size].reshape(num_sets, set_size)
