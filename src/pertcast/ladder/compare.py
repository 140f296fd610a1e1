"""Compare rungs, models and experiments on held-out perturbations, over seeds and folds.

Each candidate goes through the stages of a submission. All candidates share folds, seeds, control cells and truths, so
they are compared pair by pair.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pertcast.config import Experiment, FewshotConfig, load_experiment, model_overrides, rung_overrides
from pertcast.data.experiment import read_cells
from pertcast.data.prepare import prepare, store_identity
from pertcast.data.store import Store
from pertcast.errors import ConfigError, DataError, Problem, Problems
from pertcast.files.artefacts import any_content, claimed, write_json
from pertcast.files.resources import available_cpus
from pertcast.ladder.comparison import Comparison, as_markdown, collect, draw_chart
from pertcast.ladder.held_out import HeldOut, Scores, prepare_truth, reference_scores
from pertcast.ladder.one_training import Trial, digest_of, run_trial
from pertcast.preflight import preflight
from pertcast.progress import SILENT, Progress
from pertcast.seasons import Season, season
from pertcast.stats.draws import generator


def held_out_folds(experiment: Experiment, *, folds: int) -> tuple[list[Experiment], list[str]]:
    """Return one experiment for each fold, and notes for the user."""
    tests = {key: held.test for key, held in experiment.fewshot.items() if held.test}
    if not folds:
        return _as_it_stands(experiment)
    pool = tests or _all_labels(experiment)
    labels = sorted({label for held in pool.values() for label in held})
    if len(labels) < folds or folds < 2:
        raise ConfigError(
            f"--folds: expected 2 to {len(labels)} (the perturbations that there are to hold out), got {folds}"
        )
    order = generator(0, "folds").permutation(len(labels))
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


class Candidate(NamedTuple):
    """One candidate: its name, its experiment file, and overrides."""

    name: str
    path: Path
    overrides: tuple[str, ...]


_Kind = tuple[str, str]
"""What folds are shared by: a digest of what the store hangs on, and the scale of cells."""


class _Fold(NamedTuple):
    number: int
    fewshot: Mapping[str, Any]
    store: Path
    held_out: tuple[HeldOut, ...]
    references: dict[str, Scores]


def candidates_of(paths: Sequence[Path], *, rungs: Sequence[str], models: Sequence[str]) -> list[Candidate]:
    """Return every rung and model of every experiment; with neither, the experiments themselves."""
    found = []
    for path in paths:
        prefix = f"{path.stem}:" if len(paths) > 1 else ""
        found += [Candidate(f"{prefix}{model}", path, model_overrides(model)) for model in models]
        found += [Candidate(f"{prefix}{rung}", path, rung_overrides(rung)) for rung in rungs]
        if not rungs and not models:
            found.append(Candidate(path.stem, path, ()))
    names = [candidate.name for candidate in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two candidates are called {', '.join(twice)}; give experiment files of different names")
    return found


def compare(
    candidates: Sequence[Candidate],
    out: Path,
    *,
    seeds: int = 5,
    folds: int = 0,
    jobs: int = 1,
    overrides: Sequence[str] = (),
    progress: Progress = SILENT,
) -> Comparison:
    """Train and score every candidate on every fold and seed that is not done yet, and compare them."""
    if any_content(out) and not (out / "folds").is_dir():
        raise DataError(f"{out}: it exists and holds no comparison; give another --out, or remove it first")
    with claimed(out):
        rules = season("vcc2025")
        trials: list[Trial] = []
        held: dict[_Kind, list[_Fold]] = {}
        experiments = [
            load_experiment(candidate.path, (*candidate.overrides, *overrides), command="compare")
            for candidate in candidates
        ]
        problems = Problems()
        for experiment in {_what_preflight_reads(each): each for each in experiments}.values():
            # the submission is not made: each trial asks for the held-out targets
            alone = experiment.submission.model_copy(update={"targets": None})
            with problems.collect():
                preflight(experiment.model_copy(update={"submission": alone}))
        problems.raise_if_any()
        for candidate, experiment in zip(candidates, experiments, strict=True):
            divided = _folds(experiment, out, folds=folds, rules=rules, known=held, progress=progress)
            trials += _trials(candidate, experiment, divided, out, seeds=seeds, rules=rules)
            _require_same(divided, held)
        scores = _run_all(trials, jobs=jobs, progress=progress)
        (first, *_) = held.values()
        comparison = collect(
            [(trial.name, trial.fold, trial.seed, found) for trial, found in zip(trials, scores, strict=True)],
            [fold.references for fold in first],
            folders={trial.name: str(trial.out.parent.relative_to(out)) for trial in trials},
        )
        write_json(out / "comparison.json", comparison.as_json())
        (out / "comparison.md").write_text(as_markdown(comparison), encoding="utf-8")
        (out / "comparison.svg").write_text(draw_chart(comparison), encoding="utf-8")
    return comparison


def _what_preflight_reads(experiment: Experiment) -> str:
    tree = experiment.as_json()
    return digest_of({key: value for key, value in tree.items() if key not in ("loss", "train", "adapt", "generate")})


def _folds(
    experiment: Experiment, out: Path, *, folds: int, rules: Season, known: dict[_Kind, list[_Fold]], progress: Progress
) -> list[_Fold]:
    """Prepare the store and the truth of each fold once, for all candidates that share them."""
    controls = experiment.generate.controls_from
    digest = digest_of(store_identity(experiment.as_json()), controls, folds)
    scale = experiment.generate.scale
    if (digest, scale) in known:
        return known[digest, scale]
    divided, notes = held_out_folds(experiment, folds=folds)
    for note in notes:
        progress.note(note)
    ranked: dict[str, set[str]] = {}
    for part in divided:
        for key, fewshot in part.fewshot.items():
            ranked.setdefault(key, set()).update(fewshot.test)
    found = []
    for number, part in enumerate(divided):
        folder = out / "folds" / digest / f"fold{number}"
        store = prepare(part, folder / "store", progress=progress)
        opened = Store.open(store)
        truth = folder / f"truth-{opened.fingerprint[:10]}{'-counts' if scale == 'counts' else ''}"
        truth.mkdir(exist_ok=True)
        labels = {key: sorted(names) for key, names in ranked.items()}
        held = prepare_truth(opened, part, truth, rules=rules, ranked=labels)
        references = reference_scores(opened, held, truth / "references.json", rules=rules, progress=progress)
        found.append(_Fold(number, part.fewshot, store, tuple(held), references))
    known[digest, scale] = found
    return found


def _require_same(divided: list[_Fold], known: Mapping[_Kind, list[_Fold]]) -> None:
    """Refuse candidates with different held-out perturbations or truths on different scales."""
    problems = []
    if len({scale for _, scale in known}) > 1:
        message = "some make counts and some log1p values, which the scorer normalises otherwise"
        problems.append(Problem("[generate] scale", message, "compare them with --set generate.scale=counts, or log1p"))
    (first, *_) = known.values()
    sides = [[(held.name, held.tested) for fold in folds for held in fold.held_out] for folds in (first, divided)]
    if sides[0] != sides[1]:
        message = "they hold out different perturbations, so that their scores say nothing of each other"
        remedy = "give them the same [fewshot] and [zeroshot], or compare them with --folds"
        problems.append(Problem("experiments to compare", message, remedy))
    if problems:
        raise ConfigError(problems=problems)


def _trials(
    candidate: Candidate, experiment: Experiment, folds: list[_Fold], out: Path, *, seeds: int, rules: Season
) -> list[Trial]:
    tree = experiment.as_json()
    digest = digest_of({name: tree[name] for name in ("features", "model", "loss", "train", "generate")})
    name = candidate.name.replace(":", "-")
    return [
        Trial(
            name=candidate.name,
            fold=fold.number,
            seed=seed,
            experiment=experiment.model_copy(
                update={
                    "fewshot": fold.fewshot,
                    "train": experiment.train.model_copy(update={"seed": seed}),
                    "generate": experiment.generate.model_copy(update={"seed": seed}),
                }
            ),
            store=fold.store,
            held_out=fold.held_out,
            season=rules.name,
            out=out / "trials" / f"{name}-{digest}" / f"fold{fold.number}-seed{seed}",
        )
        for seed in range(seeds)
        for fold in folds
    ]


def _run_all(trials: Sequence[Trial], *, jobs: int, progress: Progress) -> list[Scores]:
    """Return the scores of all trials; the first seeds of all candidates run first."""
    order = sorted(range(len(trials)), key=lambda place: (trials[place].seed, trials[place].fold))
    scores: dict[int, Scores] = {}
    if jobs <= 1:
        for number, place in enumerate(order, start=1):
            progress.note(f"trial {number} of {len(trials)}: {trials[place].title}")
            scores[place] = run_trial(trials[place], progress=progress)
        return [scores[place] for place in range(len(trials))]
    with progress.task("trials", len(trials), "trials") as advance, _pool(jobs) as pool:
        waiting = {pool.submit(run_trial, trials[place]): place for place in order}
        for done in as_completed(waiting):
            scores[waiting[done]] = done.result()
            advance(1, detail=trials[waiting[done]].title)
    return [scores[place] for place in range(len(trials))]


@contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Give worker processes that share processors and accelerators; on an error, cancel the rest."""
    context = multiprocessing.get_context("spawn")
    turn = context.Value("i", 0)
    threads = max(1, available_cpus() // jobs)
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_worker, initargs=(turn, threads))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker(turn: Any, threads: int) -> None:
    """Take a share of the processors and the next accelerator, before torch is imported."""
    with turn.get_lock():
        number = turn.value
        turn.value += 1
    os.environ["OMP_NUM_THREADS"] = str(threads)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = (
        visible.split(",")
        if visible
        else [
            str(device)
            for device in range(len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()]))
        ]
    )
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
