"""A small adaptation that several tests share."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from conftest import PRECISION, write_small_h5ad
from pertcast.config import Experiment, load_experiment
from pertcast.data.prepare import prepare
from pertcast.train import train
from pertcast.train.adapt import adapt
from pertcast.train.new_line import adapted_experiment
from training_bench import EXPERIMENT, Watcher

LINE = f"""
[datasets]
line = "line.h5ad"
[training]
line = "train"
[fewshot."line.K2"]
val = ["G3"]
[columns]
cell_type = "cell_type"
batch = "batch"
[prepare]
val_controls = 0.2
num_hvgs = 8
[adapt]
trainable = "context,bias"
steps = 9
learning_rate = 0.02
val_every = 3
[train]
sets_per_step = 2
checkpoint_every = 2
precision = "{PRECISION}"
"""


class Bench:
    """A line that runs were trained on, and another that they are adapted to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_small_h5ad(folder / "small.h5ad", contexts=("H1", "H2"))
        write_small_h5ad(folder / "line.h5ad", contexts=("K2",), batches=("b2", "b9"), cells_per_group=20, seed=1)
        (folder / "experiment.toml").write_text(EXPERIMENT)
        (folder / "line.toml").write_text(LINE)

    def train(self, name: str, *overrides: str) -> Path:
        experiment = load_experiment(self.folder / "experiment.toml", ["train.steps=4", *overrides])
        return train(experiment, prepare(experiment, self.folder / f"{name}_store"), self.folder / name)

    def experiment(self, *overrides: str) -> Experiment:
        return load_experiment(self.folder / "line.toml", overrides)

    def adapt(self, run: Path, out: str, *overrides: str, progress: Watcher | None = None) -> Path:
        experiment = adapted_experiment(run, self.experiment(*overrides))
        store = prepare(experiment, self.folder / f"{run.name}_line_store")
        return adapt(run, experiment, store, self.folder / out, progress=progress or Watcher())


def changed(before: Path, after: Path) -> set[str]:
    """Names of tensors that differ in any bit, or are only in one."""
    old, new = load_file(before / "weights.safetensors"), load_file(after / "weights.safetensors")
    return {name for name in old.keys() | new.keys() if name not in old or not torch.equal(old[name], new[name])}
