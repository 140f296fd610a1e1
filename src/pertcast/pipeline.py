"""Run the whole pipeline: prepare, train, generate, assemble, check, pack; finished stages are reused.

Stages talk through files, and only this file calls them in turn. Each stage decides from its manifest whether there is
anything to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pertcast.config import load_experiment
from pertcast.errors import ConfigError, Problem
from pertcast.files.artefacts import write_json
from pertcast.processes import launched
from pertcast.progress import SILENT, Progress

if TYPE_CHECKING:
    from pertcast.submission.check import CheckReport


@dataclass(frozen=True)
class Outcome:
    """The paths of all artefacts, and the check's report."""

    store: Path
    run: Path
    parts: Path
    prediction: Path
    archive: Path
    report: CheckReport


def run_experiment(path: Path, out: Path, *, overrides: Sequence[str] = (), progress: Progress = SILENT) -> Outcome:
    """Run every stage of an experiment that is not done yet.

    Parameters
    ----------
    path
        The experiment file.
    out
        The folder of all artefacts: ``store``, ``run``, ``parts``, ``prediction.h5ad``, ``prediction.vcc``,
        ``check.json``.
    overrides
        ``section.key=value`` on top of the file.

    Raises
    ------
    PertcastError
        Whatever a stage refuses; what earlier stages made stays.
    """
    if launched() is not None:
        raise ConfigError(
            "a whole run starts its own processes (train.devices); under torchrun or srun run the stages one by one: "
            "`pertcast prepare`, then `pertcast train` and `pertcast generate` on all devices, then the others"
        )
    experiment = load_experiment(path, overrides, command="run")
    submission = experiment.submission
    if submission.genes is None or submission.targets is None:
        files = {"genes": "gene_names.csv", "targets": "pert_counts_Validation.csv"}
        raise ConfigError(
            problems=[
                Problem(f"{path}, [submission] {key}", "a whole run needs it", f'add {key} = "{name}"')
                for key, name in files.items()
                if getattr(submission, key) is None
            ]
        )

    from pertcast.data.prepare import prepare
    from pertcast.preflight import preflight

    season, genes, targets = submission.resolve(), submission.genes, submission.targets
    preflight(experiment, out=out, progress=progress)
    store = prepare(experiment, out / "store", progress=progress)

    from pertcast.generate import generate
    from pertcast.submission.assemble import assemble
    from pertcast.submission.check import check
    from pertcast.submission.pack import pack
    from pertcast.train import train

    run = train(experiment, store, out / "run", progress=progress)
    devices = experiment.train.devices
    parts = generate(run, out / "parts", experiment=experiment, store_path=store, devices=devices, progress=progress)
    prediction = assemble(parts, out / "prediction.h5ad", progress=progress)
    report = check(prediction, season=season, genes=genes, targets=targets, progress=progress)
    write_json(out / "check.json", report.as_json())
    archive = pack(prediction, out / "prediction.vcc", season=season, genes=genes, targets=targets, progress=progress)
    return Outcome(store, run, parts, prediction, archive, report)
