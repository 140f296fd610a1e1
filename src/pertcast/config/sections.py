"""Every setting: one frozen, validated section for each stage. Unknown keys are errors.

An experiment file is a superset of the ``starter.toml`` that cell-load and ``state tx train`` read: ``[datasets]``,
``[training]``, ``[zeroshot]`` and ``[fewshot]`` keep their meaning, and the other sections are ours. Relative paths are
relative to the file or, if nothing is there, to the working folder.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pertcast.errors import ConfigError, Problem
from pertcast.seasons import CONTROL_LABEL, PERT_COLUMN, Season, season

logger = logging.getLogger(__name__)

Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]


def _beside_the_file(path: Path, info: ValidationInfo) -> Path:
    return Path(resolve_path(str(path), info))


def resolve_path(path: str, info: ValidationInfo) -> str:
    """Return an absolute path or pattern, relative to the experiment file or else to the working folder."""
    base: Path = (info.context or {}).get("base", Path())
    expanded = Path(path).expanduser()
    # what comes before the first part with a wildcard or brace
    fixed = Path(*itertools.takewhile(lambda part: not re.search(r"[*?\[{]", part), expanded.parts))
    if expanded.is_absolute() or (base / fixed).exists() or fixed == Path() or not fixed.exists():
        return str((base / expanded).absolute())
    logger.warning("%s is not beside the experiment file (%s); the one in the working folder is used", path, base)
    return str(expanded.absolute())


InputPath = Annotated[Path, AfterValidator(_beside_the_file)]


class Section(BaseModel):
    """A section of the experiment file: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The model. `kind` is ``state``, the State Transition network, or a baseline."""

    kind: Literal["state", "control", "mean", "ridge", "kernel_ridge", "knn"] = "state"
    base: Literal["none", "mean", "ridge", "kernel_ridge", "knn"] = "none"
    preset: Literal["tiny", "state_sm", "state"] = "state_sm"
    input: str = "genes"
    output: Literal["genes", "hvg"] = "genes"
    set_size: PositiveInt | None = None
    hidden: PositiveInt | None = None
    layers: PositiveInt | None = None
    heads: PositiveInt | None = None
    feedforward: PositiveInt | None = None
    encoder_layers: PositiveInt | None = None
    decoder_layers: PositiveInt | None = None
    dropout: Share = 0.1
    residual: Literal["state", "shift", "none"] = "state"
    batch_embedding: bool = False
    context_embedding: bool = False

    @field_validator("input")
    @classmethod
    def _known_input(cls, value: str) -> str:
        if value not in ("genes", "hvg") and not re.fullmatch(r"obsm:.+", value):
            raise ValueError("expected 'genes', 'hvg' or 'obsm:NAME'")
        return value

    @model_validator(mode="after")
    def _base_goes_with_shift(self) -> ModelConfig:
        if self.base != "none" and (self.kind, self.residual) != ("state", "shift"):
            raise ValueError(
                f'`base = "{self.base}"` needs `kind = "state"` and `residual = "shift"`: '
                "the network adds its shift to the base"
            )
        return self


class LossConfig(Section):
    """Weights of the loss terms; 0 turns a term off. `decoder` applies if the input is an embedding."""

    energy: Weight = 1.0
    decoder: Weight = 1.0
    mae: Weight = 0.0
    de: Weight = 0.0
    rank: Weight = 0.0
    nb: Weight = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    de_head: Literal["order", "learned"] = "order"
    de_form: Literal["bce", "focal"] = "bce"
    de_positive_weight: PositiveFloat | Literal["balanced"] = "balanced"
    de_gamma: Weight = 2.0
    rank_distance: Literal["cosine", "l1"] = "cosine"
    rank_margin: Weight = 0.2
    rank_negatives: Annotated[int, Field(ge=0)] = 16

    @model_validator(mode="after")
    def _each_gene_by_itself(self) -> LossConfig:
        if self.de and self.de_head == "order" and (self.de_form, self.de_positive_weight) != ("bce", "balanced"):
            raise ValueError(
                "`de_form` and `de_positive_weight` have no effect on the order of genes; remove them, or set "
                '`de_head = "learned"`'
            )
        return self


class TrainConfig(Section):
    """The training loop: a step has `sets_per_step` x `accumulate` sets; `patience` counts validations, 0 = no end."""

    seed: int = 0
    steps: PositiveInt = 40_000
    sets_per_step: PositiveInt = 8
    accumulate: PositiveInt = 1
    optimizer: Literal["adamw", "adam"] = "adamw"
    learning_rate: PositiveFloat = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_steps: Annotated[int, Field(ge=0)] = 0
    clip: Annotated[float, Field(ge=0)] = 10.0
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    cells: Literal["auto", "device", "host"] = "auto"
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    devices: PositiveInt = 1
    num_nodes: PositiveInt = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    match: Literal["batch", "context", "all_datasets"] = "batch"
    batch_dropout: Share = 0.1
    feature_noise: Annotated[float, Field(ge=0)] = 0.0
    control_sets: bool = True
    val_every: PositiveInt = 2000
    select_by: Literal["loss", "overall", "mae", "pds", "des"] = "loss"
    max_val_sets: PositiveInt = 256
    checkpoint_every: PositiveInt = 2000
    patience: Annotated[int, Field(ge=0)] = 0
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()


class AdaptConfig(Section):
    """Adaptation to a new cell line: which parameters train, how fast, and when they stop."""

    trainable: str = "offset"
    steps: PositiveInt = 600
    learning_rate: PositiveFloat = 3e-3
    val_every: PositiveInt = 20
    patience: Annotated[int, Field(ge=0)] = 10


class FewshotConfig(Section):
    """Held-out perturbations of one ``dataset.cell_type``; the others train."""

    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


class DatasetColumns(Section):
    """Columns and labels of one dataset that differ from ``[columns]``."""

    pert: str | None = None
    control: str | None = None
    cell_type: str | None = None
    context: str | None = None
    batch: str | None = None
    rename: dict[str, str] = Field(default_factory=dict)
    layer: str | None = None


class ColumnsConfig(Section):
    """Columns of obs: the perturbation, its control label, the cell type (context), the batch."""

    pert: str = PERT_COLUMN
    control: str = CONTROL_LABEL
    cell_type: str | None = None
    context: str | None = None
    batch: str | None = None
    rename: dict[str, str] = Field(default_factory=dict)
    layer: str | None = None
    of: dict[str, DatasetColumns] = Field(default_factory=dict)

    def in_dataset(self, name: str) -> ColumnsConfig:
        """Return the columns of one dataset; its control label is its own."""
        own = self.of[name].model_dump(exclude_none=True) if name in self.of else {}
        if "cell_type" in own:
            own.setdefault("context", None)
        elif "context" in own:
            own["cell_type"] = None
        return self.model_copy(
            update={
                **own,
                "rename": {**self.rename, **own.get("rename", {})},
                "batch": own.get("batch", self.batch) or None,
                "layer": own.get("layer", self.layer) or None,
                "of": {},
            }
        )


class PrepareConfig(Section):
    """The training store: scale, normalisation, genes, and held-out cells beyond the split tables."""

    scale: Literal["auto", "counts", "log1p"] = "auto"
    target_sum: PositiveFloat | Literal["median"] = "median"
    num_hvgs: PositiveInt = 2000
    missing_genes: Literal["error", "zero"] = "error"
    controls: Literal["disjoint", "shared"] = "disjoint"
    val_controls: Share = 0.1
    test_controls: Share = 0.1
    holdout_cells: Share = 0.0
    seed: int = 0


class FeaturesConfig(Section):
    """Perturbation features: ``onehot``, ``coexpression``, ``labels``, or ``file`` (.pt dict, .npz, .parquet, .csv)."""

    kind: Literal["onehot", "coexpression", "labels", "file"] = "onehot"
    path: InputPath | None = None
    combine: Literal["none", "sum", "mean"] = "none"
    separator: Annotated[str, Field(min_length=1)] = "+"
    missing: Literal["error", "mean", "nearest"] = "error"
    num_loadings: PositiveInt = 64

    @model_validator(mode="after")
    def _path_goes_with_file(self) -> FeaturesConfig:
        if (self.kind == "file") != (self.path is not None):
            raise ValueError('`path` goes with `kind = "file"`, and only with it; set both or neither')
        return self


class GenerateConfig(Section):
    """How cells are generated. `controls_from` are the splits whose control cells may be used."""

    seed: int = 0
    scale: Literal["log1p", "counts"] = "log1p"
    cells: Literal["auto", "donors", "negative_binomial", "nb_head", "shift", "sparse", "model"] = "auto"
    residual_scale: Weight = 1.0
    calibrated: bool = False
    subtract_control_prediction: bool = False
    controls_from: Literal["train", "all"] = "train"
    unpredicted_genes: Literal["error", "control"] = "error"
    sets_per_step: PositiveInt = 8

    def resolve(self, store_scale: Literal["counts", "log1p"]) -> GenerateConfig:
        """Replace ``auto`` by the way of making cells that fits the store's scale."""
        if self.cells != "auto":
            return self
        return self.model_copy(update={"cells": "donors" if store_scale == "counts" else "sparse"})

    @property
    def reads_counts(self) -> bool:
        """Whether cells are made from whole counts of control cells, so that a depth can be requested."""
        return self.scale == "counts" or self.cells in ("donors", "negative_binomial", "nb_head")

    @model_validator(mode="after")
    def _fit_together(self) -> GenerateConfig:
        if self.residual_scale != 1 and self.cells not in ("shift", "sparse"):
            raise ValueError('`residual_scale` goes with `cells = "shift"` or "sparse"; remove it, or use one of these')
        if self.cells == "nb_head" and (self.subtract_control_prediction or self.calibrated):
            raise ValueError(
                '`cells = "nb_head"` draws counts: remove `subtract_control_prediction` and `calibrated`, which change '
                "predicted log1p values"
            )
        if self.subtract_control_prediction and self.calibrated:
            raise ValueError("`calibrated` was fitted without `subtract_control_prediction`; use only one of the two")
        return self


class SubmissionConfig(Section):
    """The submission: the season, its files, the control cells, and overridden rules."""

    season: str = "vcc2025"
    genes: InputPath | None = None
    targets: InputPath | None = None
    context: str | None = None
    dataset: str | None = None
    controls: Literal["copied", "predicted"] = "copied"
    num_controls: PositiveInt | None = None
    control_share: Share = 0.05
    rules: dict[str, int | str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known_season(self) -> SubmissionConfig:
        try:
            season(self.season, self.rules)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    def resolve(self) -> Season:
        """Return the season with the overridden rules."""
        return season(self.season, self.rules)


class Experiment(Section):
    """A resolved experiment file: paths are absolute, defaults are filled in."""

    datasets: dict[str, str]
    training: dict[str, Literal["train"]] = Field(default_factory=dict)
    zeroshot: dict[str, Literal["train", "val", "test"]] = Field(default_factory=dict)
    fewshot: dict[str, FewshotConfig] = Field(default_factory=dict)
    columns: ColumnsConfig = ColumnsConfig()
    prepare: PrepareConfig = PrepareConfig()
    features: FeaturesConfig = FeaturesConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    adapt: AdaptConfig = AdaptConfig()
    generate: GenerateConfig = GenerateConfig()
    submission: SubmissionConfig = SubmissionConfig()

    @field_validator("datasets")
    @classmethod
    def _patterns_beside_the_file(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        if not value:
            raise ValueError('expected at least one dataset, as `name = "folder, file or pattern"`')
        return {name: resolve_path(pattern, info) for name, pattern in value.items()}

    def as_json(self) -> dict[str, Any]:
        """Return the resolved settings as JSON values, as manifests store them."""
        return self.model_dump(mode="json")

    def cross_problems(self, place: str) -> list[Problem]:
        """Return problems between sections: unknown datasets, held-out control labels, missing files."""
        problems = []
        known = ", ".join(self.datasets)
        for name in self.training:
            if name not in self.datasets:
                problems.append(
                    Problem(
                        f"{place}, [training] {name}",
                        f"no such dataset; [datasets] has {known}",
                        "use one of these names",
                    )
                )
        for name in self.columns.of:
            if name not in self.datasets:
                problems.append(
                    Problem(
                        f"{place}, [columns.of.{name}]", f"no such dataset; [datasets] has {known}", "use one of these"
                    )
                )
        dataset = self.submission.dataset
        if dataset is not None and dataset not in self.datasets:
            problems.append(
                Problem(
                    f"{place}, [submission] dataset",
                    f"no such dataset: {dataset!r}; [datasets] has {known}",
                    "use one of these names",
                )
            )
        for table in ("zeroshot", "fewshot"):
            for key in getattr(self, table):
                if key.partition(".")[0] not in self.datasets or not key.partition(".")[2]:
                    problems.append(
                        Problem(
                            f'{place}, [{table}] "{key}"',
                            f'expected "dataset.cell_type" with a dataset of [datasets] ({known})',
                            "write it so",
                        )
                    )
        for key in self.zeroshot.keys() & self.fewshot.keys():
            problems.append(
                Problem(f'{place}, "{key}"', "is in both [zeroshot] and [fewshot]", "remove it from one of them")
            )
        for key, held in self.fewshot.items():
            if self.columns.control in (*held.val, *held.test):
                problems.append(
                    Problem(
                        f'{place}, [fewshot."{key}"]',
                        f"the control label {self.columns.control!r} cannot be held out",
                        "remove it; prepare.val_controls holds out control cells",
                    )
                )
        for section, key, path in self._input_paths():
            if not path.is_file():
                problems.append(
                    Problem(
                        f"{place}, [{section}] {key}",
                        f"no such file: {path}",
                        "correct the path (it is relative to the experiment file)",
                    )
                )
        return problems

    def _input_paths(self) -> Iterator[tuple[str, str, Path]]:
        named = (
            ("features", "path", self.features.path),
            ("submission", "genes", self.submission.genes),
            ("submission", "targets", self.submission.targets),
        )
        yield from ((section, key, path) for section, key, path in named if path is not None)
