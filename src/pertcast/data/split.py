"""Assign cells to training, validation and test as cell-load does, and hold out control cells.

Invariants: a cell's split depends on the seed, its dataset, file and name, never on the order of cells or files. No
cell is in two splits, except those of a label that is listed for both val and test.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from pertcast.config import Experiment
from pertcast.errors import DataError, Problem
from pertcast.files.labels import is_control_name
from pertcast.files.obs import near_misses
from pertcast.files.scales import Scale
from pertcast.stats.draws import key_hash


class Split(enum.IntFlag):
    """The split of a cell; a label held out for both is ``VAL | TEST``, an unused cell is 0."""

    TRAIN = 1
    VAL = 2
    TEST = 4


@dataclass(frozen=True, eq=False)
class CellKeys:
    """What a cell's split depends on."""

    datasets: tuple[str, ...]  # Categories; `files` are file names without their folders
    contexts: tuple[str, ...]
    perts: tuple[str, ...]
    files: tuple[str, ...]
    dataset_codes: np.ndarray  # (num_cells,) positions in them
    context_codes: np.ndarray
    pert_codes: np.ndarray
    file_codes: np.ndarray
    names: np.ndarray  # (num_cells,) names of the cells; one that repeats within a file counts with its occurrence

    def groups(self) -> Iterator[tuple[str, str, np.ndarray]]:
        """Yield ``(dataset, context, rows)`` of every dataset and context that has cells."""
        both = self.dataset_codes.astype(np.int64) * len(self.contexts) + self.context_codes
        order = np.argsort(both, kind="stable")
        found, starts = np.unique(both[order], return_index=True)
        for code, rows in zip(found, np.split(order, starts[1:]), strict=True):
            yield self.datasets[code // len(self.contexts)], self.contexts[code % len(self.contexts)], rows

    def occurrences(self) -> np.ndarray:
        """Return how many earlier cells of the same file share each cell's name."""
        name_codes, _ = pd.factorize(self.names)
        both = name_codes.astype(np.int64) * len(self.files) + self.file_codes
        order = np.argsort(both, kind="stable")
        new = np.flatnonzero(np.diff(both[order], prepend=-1))
        result = np.empty(len(both), dtype=np.int64)
        result[order] = np.arange(len(both)) - np.repeat(new, np.diff(new, append=len(both)))
        return result


class CodedCells:
    """Cells by their codes, of a store or of files that are not prepared yet."""

    path: Path
    genes: tuple[str, ...]
    perts: tuple[str, ...]
    contexts: tuple[str, ...]
    datasets: tuple[str, ...]
    control: str
    split: np.ndarray
    dataset_codes: np.ndarray
    context_codes: np.ndarray
    pert_codes: np.ndarray

    @property
    def known_scale(self) -> Scale | None:
        """The scale of the values, or ``None`` if it is not known yet."""
        return None

    @property
    def control_code(self) -> int:
        """The code of the control label."""
        return self.perts.index(self.control)

    def rows(
        self, *, split: Split, dataset: int | None = None, context: int | None = None, pert: int | None = None
    ) -> np.ndarray:
        """Return the rows in any of the splits that have the given codes, ascending."""
        found = (self.split & int(split)) > 0 if split else self.split == 0
        for codes, wanted in ((self.dataset_codes, dataset), (self.context_codes, context), (self.pert_codes, pert)):
            if wanted is not None:
                found &= codes == wanted
        return np.flatnonzero(found).astype(np.int64)


class _Drawer:
    """Order cells by a keyed hash, so that the first ones are a draw independent of their order."""

    def __init__(self, keys: CellKeys, seed: int) -> None:
        self._keys, self._seed = keys, seed
        self._occurrences = keys.occurrences()
        self._hash_keys: dict[tuple[int, int], bytes] = {}

    def _rank(self, row: int) -> tuple[bytes, str, int]:
        keys = self._keys
        pair = (int(keys.dataset_codes[row]), int(keys.file_codes[row]))
        if pair not in self._hash_keys:
            number = key_hash(self._seed, "split", keys.datasets[pair[0]], keys.files[pair[1]])
            self._hash_keys[pair] = number.to_bytes(16, "little")
        name, occurrence = str(keys.names[row]), int(self._occurrences[row])
        text = f"{name}\n{occurrence}" if occurrence else name
        return hashlib.blake2b(text.encode(), key=self._hash_keys[pair], digest_size=16).digest(), name, occurrence

    def order(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows in random order."""
        return np.asarray(sorted(rows.tolist(), key=self._rank), dtype=np.int64)


def _share_of(share: float, number: int) -> int:
    """Return the number of cells in a share, at least one."""
    return max(1, round(share * number)) if share > 0 and number else 0


class _HeldOut(NamedTuple):
    """The renamed labels of one dataset and cell type that [fewshot] holds out."""

    val: set[str]
    test: set[str]


def _held_out(experiment: Experiment, key: str) -> _HeldOut:
    names = experiment.columns.in_dataset(key.partition(".")[0]).rename
    held = experiment.fewshot[key]
    return _HeldOut(*({names.get(label, label) for label in labels} for labels in (held.val, held.test)))


def _held_out_problems(experiment: Experiment, keys: CellKeys) -> list[Problem]:
    """Return every held-out cell type and label that no file has."""
    problems = []
    labels = {
        f"{dataset}.{context}": {keys.perts[code] for code in np.unique(keys.pert_codes[rows])}
        for dataset, context, rows in keys.groups()
    }
    for section in ("zeroshot", "fewshot"):
        for key in getattr(experiment, section):
            if key not in labels:
                near = near_misses(key, list(labels)) or list(labels)
                problems.append(
                    Problem(
                        f'[{section}] "{key}"',
                        "no cell of the data is of this dataset and cell type",
                        f"there is {', '.join(near)}",
                    )
                )
    for key in experiment.fewshot:
        if key not in labels:
            continue
        for name, wanted in _held_out(experiment, key)._asdict().items():
            unknown = sorted(wanted - labels[key])
            for label in unknown:
                near = near_misses(label, sorted(labels[key]))
                problems.append(
                    Problem(
                        f'[fewshot."{key}"] {name}',
                        f"no cell of {key} has the perturbation {label!r}",
                        f"did you mean {' or '.join(map(repr, near))}?" if near else "remove it",
                    )
                )
    return problems


def _missing_controls(experiment: Experiment, keys: CellKeys, place: str, rows: np.ndarray) -> Problem:
    control = experiment.columns.control
    present = sorted({keys.perts[code] for code in np.unique(keys.pert_codes[rows])})
    near = near_misses(control, present) or [label for label in present if is_control_name(label, control)]
    remedy = f"did you mean {near[0]!r}? set columns.control" if near else f"labels there: {', '.join(present[:8])} ..."
    remedy += '; or borrow controls of another dataset with train.match = "all_datasets"'
    return Problem(place, f"no control cell: none has {control!r} in column {experiment.columns.pert!r}", remedy)


def assign_split(experiment: Experiment, keys: CellKeys) -> np.ndarray:
    """Return the :class:`Split` flags of every cell, uint8; 0 if a cell is not used."""
    prepare = experiment.prepare
    problems = _held_out_problems(experiment, keys)
    drawer = _Drawer(keys, prepare.seed)
    is_control = np.array([label == experiment.columns.control for label in keys.perts], dtype=bool)[keys.pert_codes]
    flags = np.zeros(len(keys.names), dtype=np.uint8)
    with_controls = {keys.contexts[code] for code in np.unique(keys.context_codes[is_control])}
    for dataset, context, rows in keys.groups():
        place = f"{dataset}.{context}"
        controls, perturbed = rows[is_control[rows]], rows[~is_control[rows]]
        of_label = _label_flags(experiment, keys, dataset, place)
        flags[perturbed] = of_label[keys.pert_codes[perturbed]]
        if not flags[perturbed].any():
            named = dataset in experiment.training or place in experiment.zeroshot or place in experiment.fewshot
            flags[controls] = Split.TRAIN if named else 0
            continue
        if not len(controls) and not (experiment.train.match == "all_datasets" and context in with_controls):
            problems.append(_missing_controls(experiment, keys, place, rows))
            continue
        if prepare.holdout_cells > 0:
            _hold_out_cells(flags, perturbed, keys.pert_codes, share=prepare.holdout_cells, drawer=drawer)
        problems += _split_controls(experiment, flags, controls, perturbed, drawer, place)
    trained = flags[~is_control] & Split.TRAIN
    if not problems and not trained.any():
        problems.append(
            Problem(
                "[training]",
                "no perturbed cell is left to train on",
                'add the dataset: name = "train", or hold out less',
            )
        )
    if problems:
        raise DataError("the split does not fit the data" if len(problems) > 1 else "", problems=problems)
    return flags


def _label_flags(experiment: Experiment, keys: CellKeys, dataset: str, place: str) -> np.ndarray:
    """Return the flags of each perturbation in a dataset and context, uint8."""
    if place in experiment.zeroshot:
        return np.full(len(keys.perts), Split[experiment.zeroshot[place].upper()], dtype=np.uint8)
    held = _held_out(experiment, place) if place in experiment.fewshot else None
    default = Split.TRAIN if dataset in experiment.training or held is not None else 0
    result = np.full(len(keys.perts), default, dtype=np.uint8)
    if held is not None:
        for code, label in enumerate(keys.perts):
            both = (Split.VAL if label in held.val else 0) | (Split.TEST if label in held.test else 0)
            result[code] = both or default
    return result


def _hold_out_cells(
    flags: np.ndarray, perturbed: np.ndarray, pert_codes: np.ndarray, *, share: float, drawer: _Drawer
) -> None:
    """Move a share of each training perturbation's cells to VAL."""
    training = perturbed[flags[perturbed] == Split.TRAIN]
    for code in np.unique(pert_codes[training]):
        rows = training[pert_codes[training] == code]
        held = min(_share_of(share, len(rows)), len(rows) - 1)
        flags[drawer.order(rows)[:held]] = Split.VAL


def _split_controls(
    experiment: Experiment, flags: np.ndarray, controls: np.ndarray, perturbed: np.ndarray, drawer: _Drawer, place: str
) -> list[Problem]:
    """Divide control cells among the splits of this context's perturbed cells, or share them."""
    prepare = experiment.prepare
    some = np.bitwise_or.reduce(flags[perturbed])
    if prepare.controls == "shared":
        flags[controls] = some | Split.TRAIN
        return []
    num_val = _share_of(prepare.val_controls, len(controls)) if some & Split.VAL or prepare.holdout_cells > 0 else 0
    num_test = _share_of(prepare.test_controls, len(controls)) if some & Split.TEST else 0
    left = len(controls) - num_val - num_test
    if len(controls) and left < bool(some & Split.TRAIN):
        return [
            Problem(
                place,
                f"{len(controls)} control cells are too few to train, validate ({num_val}) and test ({num_test})",
                "lower prepare.val_controls or prepare.test_controls, or hold out nothing here",
            )
        ]
    flags[controls] = Split.TRAIN
    if num_val or num_test:
        order = drawer.order(controls)
        flags[order[:num_val]] = Split.VAL
        flags[order[num_val : num_val + num_test]] = Split.TEST
    return []
