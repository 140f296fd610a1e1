"""Cell sets: S perturbed cells of one context and target with S matched controls; pure index arithmetic.

Invariants: a set never mixes contexts, targets or splits; every cell of a group appears in an epoch; no cell stands
twice in a set unless its group is smaller than a set; what one group gets depends on no other target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pertcast.data.split import Split
from pertcast.errors import DataError, Problem
from pertcast.stats.draws import generator

__all__ = ["CellSets", "CellTable", "generation_sets", "training_sets"]

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


class CellTable(Protocol):
    """What sets are cut from: the codes of each cell and their names, as a store has them.

    Attributes
    ----------
    pert_codes, context_codes, batch_codes
        (cells,) int32; batch -1 is unknown.
    split
        (cells,) uint8 of ``Split`` flags.
    perts, contexts
        Names of the codes.
    control_code
        The code of the control label, -1 where the table has no control cell.
    """

    @property
    def pert_codes(self) -> Int32: ...  # noqa: D102
    @property
    def context_codes(self) -> Int32: ...  # noqa: D102
    @property
    def batch_codes(self) -> Int32: ...  # noqa: D102
    @property
    def split(self) -> NDArray[np.uint8]: ...  # noqa: D102
    @property
    def perts(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def contexts(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def control_code(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class CellSets:
    """N sets of S perturbed cells, each cell beside its control.

    Attributes
    ----------
    pert, context
        (N,) int32: codes of each set's target and context.
    pert_rows, control_rows
        (N, S) int64: rows of the store.
    num_repeating
        Groups (context and target) smaller than a set, whose cells repeat within it.
    num_unmatched
        Cells whose controls were to be of their own batch, and are of their context since that batch has none.
    """

    pert: Int32
    context: Int32
    pert_rows: Int64
    control_rows: Int64
    num_repeating: int = 0
    num_unmatched: int = 0

    def __len__(self) -> int:
        """Return N."""
        return len(self.pert)

    def __getitem__(self, item: slice | Int64) -> CellSets:
        """Return some of the sets, in order; the two counts stay those of the whole epoch."""
        return CellSets(
            self.pert[item],
            self.context[item],
            self.pert_rows[item],
            self.control_rows[item],
            self.num_repeating,
            self.num_unmatched,
        )

    @property
    def groups(self) -> list[tuple[int, int]]:
        """The codes of each set's context and target."""
        return list(zip(self.context.tolist(), self.pert.tolist(), strict=True))


@dataclass(frozen=True)
class _Groups:
    """Rows brought together by their key: group i is ``rows[starts[i] : starts[i] + counts[i]]``; keys ascend."""

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
        """Return the group of each wanted key, -1 where there is none."""
        place = np.searchsorted(self.keys, wanted)
        found = np.append(self.keys, -1)[place] == wanted
        return np.where(found & (wanted >= 0), place, -1)

    def take(self, group: Int64, turn: Int64) -> Int64:
        """Return the row at each turn of its group, cyclically."""
        return self.rows[self.starts[group] + turn % self.counts[group]]


def _ranks(keys: Int64) -> Int64:
    """Return how many equal keys stand before each place."""
    places = _Groups.of(np.arange(len(keys)), keys)
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[places.rows] = np.arange(len(keys)) - np.repeat(places.starts, places.counts)
    return ranks


def training_sets(
    table: CellTable,
    *,
    set_size: int,
    seed: int,
    epoch: int,
    split: Split,
    match: Literal["batch", "context"],
    control_sets: bool,
) -> CellSets:
    """Cut every group of a split into sets of `set_size` cells, each cell beside a control; new at each epoch.

    A group is the cells of one context and target. It is shuffled and cut; its last set is filled with other cells of
    the group. Controls are taken in turn from the shuffled control cells of the same context and split (of the cell's
    own batch where `match` is "batch" and that batch has some), so none repeats in a set unless there are too few.
    A control cell of a control set is never beside itself, unless it is the only one of its context.

    Parameters
    ----------
    table
        The store, or anything with its codes.
    set_size
        S, cells in a set.
    seed, epoch
        Equal values give equal sets.
    split
        The ``Split`` that cells and controls are of.
    match
        Which controls a perturbed cell may be beside.
    control_sets
        Whether the control label is one more target.

    Raises
    ------
    DataError
        If a context has perturbed cells in the split and no control cell; all such contexts at once.
    """
    num_perts = len(table.perts)
    rows = np.flatnonzero((table.split & split) != 0).astype(np.int64)
    groups = _Groups.of(rows, table.context_codes[rows].astype(np.int64) * num_perts + table.pert_codes[rows])
    contexts, perts = groups.keys // num_perts, groups.keys % num_perts
    is_control = perts == table.control_code
    _require_controls(table, contexts, is_control)

    offsets = np.empty(len(perts), dtype=np.int64)
    for index, (context, pert) in enumerate(zip(contexts.tolist(), perts.tolist(), strict=True)):
        random = generator(seed, "sets", epoch, table.contexts[context], table.perts[pert])
        random.shuffle(groups.rows[groups.starts[index] :][: groups.counts[index]])
        offsets[index] = random.integers(1 << 40)

    kept = np.flatnonzero(~is_control | control_sets)
    group = np.repeat(kept, -(-groups.counts[kept] // set_size) * set_size)
    turn = _ranks(group)
    pert_rows = groups.take(group, turn)
    control_rows, has_own_batch = _controls_beside(
        table,
        pert_rows,
        controls=groups.rows[np.repeat(is_control, groups.counts)],
        by_batch=match == "batch",
        slots=_Slots(group, turn, offsets[group], is_control[group]),
    )
    unmatched = ~has_own_batch & (turn < groups.counts[group]) & (match == "batch")
    shuffled = generator(seed, "set order", epoch).permutation(len(group) // set_size)
    group_of_set = group[::set_size][shuffled]
    return CellSets(
        pert=perts[group_of_set].astype(np.int32),
        context=contexts[group_of_set].astype(np.int32),
        pert_rows=pert_rows.reshape(-1, set_size)[shuffled],
        control_rows=control_rows.reshape(-1, set_size)[shuffled],
        num_repeating=int((groups.counts[kept] < set_size).sum()),
        num_unmatched=int(unmatched.sum()),
    )


def _require_controls(table: CellTable, contexts: Int64, is_control: NDArray[np.bool_]) -> None:
    lacking = np.setdiff1d(contexts[~is_control], contexts[is_control])
    if len(lacking):
        raise DataError(
            problems=[
                Problem(
                    f"context {table.contexts[code]!r}",
                    "it has perturbed cells in this split, and no control cell",
                    "mend columns.control, or give the split a share of them (prepare.val_controls, test_controls)",
                )
                for code in lacking
            ]
        )


class _Slots(NamedTuple):
    """The places that need a control: the group, the turn in it, where the group starts, whether it is of controls."""

    group: Int64
    turn: Int64
    offset: Int64
    own: NDArray[np.bool_]

    def at(self, mask: NDArray[np.bool_]) -> _Slots:
        return _Slots(self.group[mask], self.turn[mask], self.offset[mask], self.own[mask])


def _pool_keys(table: CellTable, rows: Int64) -> Int64:
    """Return one integer for each (context, batch), -1 where the batch is unknown."""
    batches = table.batch_codes[rows].astype(np.int64)
    return np.where(batches < 0, -1, (table.context_codes[rows].astype(np.int64) << 32) | batches)


def _controls_beside(
    table: CellTable, pert_rows: Int64, *, controls: Int64, by_batch: bool, slots: _Slots
) -> tuple[Int64, NDArray[np.bool_]]:
    """Return a control for each slot, and whether it is of the slot's own batch.

    The k-th slot of a group that needs a pool takes its (k + offset)-th cell, cyclically: any run shorter than the pool
    has no repeat. A control group runs through the pools in their own order, so an offset of at least 1 never meets
    the cell itself.
    """
    in_context = _Groups.of(controls, table.context_codes[controls].astype(np.int64))
    pool = in_context.find(table.context_codes[pert_rows].astype(np.int64))
    result = in_context.take(pool, slots.turn + _start(in_context.counts[pool], slots))

    known = controls[(table.batch_codes[controls] >= 0) & by_batch]
    in_batch = _Groups.of(known, _pool_keys(table, known))
    pool = in_batch.find(_pool_keys(table, pert_rows))
    # a control that is alone in its batch would be beside itself
    matched = np.append(in_batch.counts, 0)[pool] > slots.own
    pool, some = pool[matched], slots.at(matched)
    turn = _ranks(some.group * len(in_batch.keys) + pool)
    result[matched] = in_batch.take(pool, turn + _start(in_batch.counts[pool], some))
    return result, matched


def _start(size: Int64, slots: _Slots) -> Int64:
    """Return where a group starts in its pool: anywhere, or anywhere but at itself."""
    return np.where(slots.own & (size > 1), 1 + slots.offset % np.maximum(size - 1, 1), slots.offset % size)


def generation_sets(
    table: CellTable,
    *,
    context: int,
    target: str,
    num_cells: int,
    set_size: int,
    seed: int,
    controls: Int64,
) -> Int64:
    """Draw the control cells that the cells of one target are made from.

    The pool is gone through in a random order in which every stretch has the batches in the pool's proportions; when
    it is used up it is gone through again in another order. The draw is keyed by the seed, the context's name and the
    target, so it does not depend on other targets, and asking for more cells keeps the first ones.

    Parameters
    ----------
    table
        The store, or anything with its codes.
    context
        The context's code.
    target
        The label to generate.
    num_cells, set_size
        Cells asked for, and S; the last set is full, its surplus is the caller's to drop.
    seed
        The seed of generation.
    controls
        The pool: rows of control cells of this context, in any order.

    Returns
    -------
    (ceil(num_cells / S), S) int64 rows; none repeats in a set unless the pool is smaller than S.

    Raises
    ------
    DataError
        If the pool is empty.
    """
    name = table.contexts[context]
    pool = np.unique(np.asarray(controls, dtype=np.int64))
    if not len(pool):
        raise DataError(
            f"context {name!r}: no control cell to generate {target!r} from; mend columns.control, or take control "
            'cells of every split (generate.controls_from = "all")'
        )
    num_sets = -(-num_cells // set_size)
    random = generator(seed, "generate", name, target)
    strata = _Groups.of(pool, table.batch_codes[pool].astype(np.int64))
    drawn = np.empty(0, dtype=np.int64)
    while len(drawn) < num_sets * set_size:
        lap = _stratified_lap(strata, random)
        begun = drawn[len(drawn) - len(drawn) % set_size :]
        late = np.isin(lap, begun)
        drawn = np.concatenate([drawn, lap[~late], lap[late]])
    return drawn[: num_sets * set_size].reshape(num_sets, set_size)


def _stratified_lap(strata: _Groups, random: np.random.Generator) -> Int64:
    """Return all rows once, each stratum shuffled and spread evenly over the lap."""
    stratum = np.repeat(np.arange(len(strata.counts)), strata.counts)
    shuffled = strata.rows[np.lexsort((random.random(len(stratum)), stratum))]
    rank = np.arange(len(stratum)) - strata.starts[stratum]
    return shuffled[np.argsort((rank + random.random(len(stratum))) / strata.counts[stratum], kind="stable")]
