"""Import a folder of ``state tx train`` as a run, and export a run as such a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pertcast.arc import (
    ArcFolder,
    ArcNames,
    ArcNetwork,
    convert_run,
    hash_contents,
    network_names,
    read_arc_folder,
    write_arc_folder,
)
from pertcast.config import ColumnsConfig, Experiment, ModelConfig
from pertcast.data.features import PertFeatures, open_features, save_features
from pertcast.errors import CheckpointError, DataError
from pertcast.files.artefacts import any_content
from pertcast.models.run_folder import Run, open_run, save_run
from pertcast.progress import SILENT, Progress

_FEATURES = "features"


def import_run(
    folder: Path,
    out: Path,
    *,
    checkpoint: Path | None = None,
    genes: Path | None = None,
    hvgs: Path | None = None,
    target_sum: float | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Import a folder that ``state tx train`` wrote, without running any code in it."""
    if target_sum is not None and not 0 < target_sum < float("inf"):
        raise DataError(f"--target-sum: expected a number above 0, got {target_sum}")
    if any_content(out) and not (out / "run.json").is_file():
        raise DataError(f"{out}: it exists and holds no run; give another --out, or remove it first")
    arc = read_arc_folder(folder, checkpoint=checkpoint)
    network = convert_run(arc)
    names = network_names(arc, network, genes=_read_names(genes), hvgs=_read_names(hvgs))
    control = str(arc.options.get("control_pert") or arc.data.get("control_pert") or "non-targeting")
    if control not in arc.perts:
        raise CheckpointError(f"{folder / 'pert_onehot_map.pt'}: expected the control label {control!r} in it")
    run = _run_of(arc, network, names, out=out, control=control, target_sum=target_sum)
    features = PertFeatures(
        names=tuple(arc.perts),
        matrix=torch.stack(list(arc.perts.values())).numpy(),
        kind="onehot",
        control=control,
        source=f"pert_onehot_map.pt of {folder}",
    )
    save_features(features, out / _FEATURES)
    save_run(run, network.weights, inputs={"checkpoint contents": hash_contents(arc.checkpoint)})
    for note in run.notes:
        progress.note(note)
    return out


def _run_of(
    arc: ArcFolder, network: ArcNetwork, names: ArcNames, *, out: Path, control: str, target_sum: float | None
) -> Run:
    spec, position = network.spec, {gene: place for place, gene in enumerate(names.outputs)}
    experiment = Experiment(
        datasets={"imported": str(arc.path.absolute())},
        columns=ColumnsConfig(control=control),
        model=ModelConfig(
            input=_source(arc, names),
            set_size=spec.set_size,
            hidden=spec.hidden,
            layers=spec.layers,
            heads=spec.heads,
            feedforward=spec.feedforward,
            encoder_layers=spec.encoder_layers,
            decoder_layers=spec.decoder_layers,
        ),
    )
    scale = "the network reads and gives log1p values on the scale of the cells that `state tx train` read"
    return Run(
        path=out,
        spec=spec,
        experiment=experiment.as_json(),
        genes=names.outputs,
        output_genes=np.arange(len(names.outputs)),
        hvg=np.array([position[gene] for gene in names.inputs], dtype=np.int64),
        perts=tuple(arc.perts),
        contexts=arc.contexts,
        batches=arc.batches,
        control=control,
        target_sum=target_sum,
        scale="log1p",
        store_path=arc.path,
        store_fingerprint="",
        step=arc.step,
        metrics={
            "last_step": arc.step,
            "val_loss": None,
            "num_parameters": sum(value.numel() for value in network.weights.values()),
            "stopped_early": False,
        },
        features={"kind": "onehot", "source": "pert_onehot_map.pt", "dim": spec.pert_dim, "filled": {}},
        notes=(f"imported from {arc.checkpoint}", scale, *network.notes),
    )


def _source(arc: ArcFolder, names: ArcNames) -> str:
    if names.embedding is not None:
        return f"obsm:{names.embedding}"
    return "genes" if arc.options.get("embed_key") is None else "hvg"


def _read_names(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a text file with one gene name a line ({error})") from None
    return tuple(line.strip() for line in lines if line.strip())


def export_run(run_path: Path, out: Path, *, progress: Progress = SILENT) -> Path:
    """Write a run as a folder that ``state tx infer`` reads, and note what is left out."""
    if any_content(out):
        raise DataError(f"{out}: it exists already; give another --out, or remove it first")
    run = open_run(run_path)
    features = open_features(run_path / _FEATURES)
    vectors = {name: torch.from_numpy(row.copy()) for name, row in zip(features.names, features.matrix, strict=True)}
    for note in write_arc_folder(run, vectors, out):
        progress.note(note)
    return out
