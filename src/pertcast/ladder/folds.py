"""Which perturbations a comparison holds out: those of the experiment, or all of them in turn, fold by fold."""

from __future__ import annotations

from collections.abc import Sequence

from pertcast.config import Experiment, FewshotConfig
from pertcast.data.experiment import read_cells
from pertcast.errors import ConfigError
from pertcast.stats.draws import generator

__all__ = ["held_out_folds"]


def held_out_folds(experiment: Experiment, *, folds: int, seed: int = 0) -> tuple[list[Experiment], list[str]]:
    """Return one experiment for each fold, and what the user should know.

    Parameters
    ----------
    experiment
        With 0 folds it is compared as it stands: on its test perturbations, or where it has none on those that
        validate.
    folds
        Into how many parts to divide perturbations; each is the test of one fold. Those divided are the ones that
        ``[fewshot]`` lists as test, and without any all of every context; a label is in the same fold in all its
        contexts. Perturbations that validate do so in every fold.
    seed
        Key of the division.

    Raises
    ------
    ConfigError
        If nothing is held out, or there are fewer perturbations than folds.
    """
    tests = {key: held.test for key, held in experiment.fewshot.items() if held.test}
    if not folds:
        return _as_it_stands(experiment)
    pool = tests or _all_labels(experiment)
    labels = sorted({label for held in pool.values() for label in held})
    if len(labels) < folds or folds < 2:
        raise ConfigError(
            f"--folds: expected 2 to {len(labels)} (the perturbations that there are to hold out), got {folds}"
        )
    order = generator(seed, "folds").permutation(len(labels))
    fold_of = {labels[place]: number % folds for number, place in enumerate(order)}
    divided = []
    for fold in range(folds):
        fewshot = dict(experiment.fewshot)
        for key, held in pool.items():
            test = tuple(label for label in held if fold_of[label] == fold)
            val = tuple(label for label in fewshot.get(key, FewshotConfig()).val if label not in test)
            fewshot[key] = FewshotConfig(val=val, test=test)
        divided.append(experiment.model_copy(update={"fewshot": fewshot}))
    return divided, [f"{len(labels)} perturbations in {folds} folds; each is held out once"]


def _as_it_stands(experiment: Experiment) -> tuple[list[Experiment], list[str]]:
    if any(held.test for held in experiment.fewshot.values()) or "test" in experiment.zeroshot.values():
        return [experiment], []
    if not any(held.val for held in experiment.fewshot.values()):
        raise ConfigError(
            "no perturbation is held out; list some as test in [fewshot], or let --folds 5 hold out all in turn"
        )
    fewshot = {key: FewshotConfig(val=held.val, test=held.val) for key, held in experiment.fewshot.items()}
    note = "no test perturbations: those that validate, and choose the step of each run, are compared on, too"
    return [experiment.model_copy(update={"fewshot": fewshot})], [note]


def _all_labels(experiment: Experiment) -> dict[str, Sequence[str]]:
    keys = read_cells(experiment).keys
    found: dict[str, Sequence[str]] = {}
    for dataset, context, rows in keys.groups():
        name = f"{dataset}.{context}"
        if dataset in experiment.training and name not in experiment.zeroshot:
            labels = {keys.perts[code] for code in set(keys.pert_codes[rows].tolist())}
            found[name] = tuple(sorted(labels - {experiment.columns.control}))
    return found
