"""Every knob: one frozen, validated section per stage; unknown keys are errors.

An experiment file is a superset of the ``starter.toml`` that cell-load and ``state tx train`` read: ``[datasets]``,
``[training]``, ``[zeroshot]`` and ``[fewshot]`` keep their meaning, the other sections are ours.
Relative paths are relative to the file.
"""

from __future__ import annotations

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

__all__ = [
    "RESIDUAL_OF_SWITCH",
    "ColumnsConfig",
    "Experiment",
    "FeaturesConfig",
    "FewshotConfig",
    "GenerateConfig",
    "LossConfig",
    "ModelConfig",
    "PrepareConfig",
    "SubmissionConfig",
    "TrainConfig",
]

Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]

# What `model.residual` was called when it was a switch.
RESIDUAL_OF_SWITCH = {True: "state", False: "none"}


def _beside_the_file(path: Path, info: ValidationInfo) -> Path:
    return (_base(info) / path.expanduser()).absolute()


def _base(info: ValidationInfo) -> Path:
    """Return the folder that relative paths are relative to: the experiment file's, or the working folder."""
    base: Path = (info.context or {}).get("base", Path())
    return base


InputPath = Annotated[Path, AfterValidator(_beside_the_file)]


class Section(BaseModel):
    """A section of the experiment file: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FewshotConfig(Section):
    """Perturbations of one ``dataset.cell_type`` that are held out; the others train."""

    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


class ColumnsConfig(Section):
    """Where obs says what: the perturbation, the control label in it, the cell type (context), the batch.

    `context` names the one context of data that has no cell-type column.
    """

    pert: str = PERT_COLUMN
    control: str = CONTROL_LABEL
    cell_type: str | None = None
    context: str | None = None
    batch: str | None = None


class PrepareConfig(Section):
    """The training store: scale, normalisation, genes, and what is held out beside the split of the file.

    `target_sum` is the total that each cell is normalised to before log1p: "median" of the training cells, or a number.
    `val_controls` and `test_controls` are shares of each context's control cells; `holdout_cells` is the share of each
    training perturbation's cells that validate (seen perturbations, unseen cells).
    """

    scale: Literal["auto", "counts", "log1p"] = "auto"
    target_sum: PositiveFloat | Literal["median"] = "median"
    num_hvgs: PositiveInt = 2000
    missing_genes: Literal["error", "zero"] = "error"
    val_controls: Share = 0.1
    test_controls: Share = 0.1
    holdout_cells: Share = 0.0
    seed: int = 0


class FeaturesConfig(Section):
    """Perturbation features: ``onehot``, ``coexpression``, or ``file`` (.pt dict, .npz, .parquet, .csv).

    `missing` says what a target without a feature gets; anything but "error" is counted in every report.
    """

    kind: Literal["onehot", "coexpression", "file"] = "onehot"
    path: InputPath | None = None
    missing: Literal["error", "mean", "nearest"] = "error"
    num_loadings: PositiveInt = 64

    @model_validator(mode="after")
    def _path_goes_with_file(self) -> FeaturesConfig:
        if (self.kind == "file") != (self.path is not None):
            raise ValueError('`path` goes with `kind = "file"`, and only with it; set both or neither')
        return self


class ModelConfig(Section):
    """The State Transition network: a preset, and what differs from it.

    `input` is what control cells are read as: ``genes``, ``hvg``, or ``obsm:NAME`` (an embedding, with a decoder to
    genes). `output` is ``genes`` (all of the gene list) or ``hvg``.

    `residual` says what the network's output is added to: ``state``, the encoded control cell, as in STATE; ``shift``,
    the control cell itself, so that the control condition comes out unchanged (input and output must be the same
    genes); or ``none``.
    """

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

    @field_validator("residual", mode="before")
    @classmethod
    def _no_switch(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError(  # noqa: TRY004 (pydantic takes no TypeError)
                f'expected "state", "shift" or "none"; what was {str(value).lower()} is "{RESIDUAL_OF_SWITCH[value]}"'
            )
        return value

    @field_validator("input")
    @classmethod
    def _known_input(cls, value: str) -> str:
        if value not in ("genes", "hvg") and not re.fullmatch(r"obsm:.+", value):
            raise ValueError("expected 'genes', 'hvg' or 'obsm:NAME'")
        return value


class LossConfig(Section):
    """Weights of the terms of the loss; 0 switches a term off. `decoder` applies where the input is an embedding.

    `mae` is of the pseudobulk, `de` of the head that says which genes are differentially expressed, `rank` of how much
    nearer a predicted effect is to its own real one than to others'; their weights rise linearly over `warmup_steps`.
    The DE head learns by cross-entropy, ``bce`` with a weight for differentially expressed genes ("balanced": as many
    times as they are rarer), or ``focal`` with `de_gamma`. Ranking measures ``l1`` or ``cosine`` and compares with
    the other sets of the batch and with `rank_negatives` effects of other training perturbations.
    """

    energy: Weight = 1.0
    decoder: Weight = 1.0
    mae: Weight = 0.0
    de: Weight = 0.0
    rank: Weight = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    de_form: Literal["bce", "focal"] = "bce"
    de_positive_weight: PositiveFloat | Literal["balanced"] = "balanced"
    de_gamma: Weight = 2.0
    rank_distance: Literal["l1", "cosine"] = "l1"
    rank_margin: Weight = 0.01
    rank_negatives: Annotated[int, Field(ge=0)] = 16


class TrainConfig(Section):
    """The training loop: a step is `sets_per_step` sets times `accumulate`; `patience` counts validations, 0 = no end.

    `match` says which controls a perturbed cell may be paired with: those of its ``batch`` where it is known, or any
    of its ``context``.
    """

    seed: int = 0
    steps: PositiveInt = 40_000
    sets_per_step: PositiveInt = 8
    accumulate: PositiveInt = 1
    optimizer: Literal["adamw", "adam"] = "adamw"
    learning_rate: PositiveFloat = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip: Annotated[float, Field(ge=0)] = 10.0
    precision: Literal["fp32", "bf16"] = "fp32"
    accelerator: str = "auto"
    devices: PositiveInt = 1
    match: Literal["batch", "context"] = "batch"
    control_sets: bool = True
    val_every: PositiveInt = 2000
    max_val_sets: PositiveInt = 256
    checkpoint_every: PositiveInt = 2000
    patience: Annotated[int, Field(ge=0)] = 0
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()


class GenerateConfig(Section):
    """How cells are made. `controls_from` are the splits whose control cells a set may be made of.

    `other_genes` says where genes come from that the model does not predict (``output = "hvg"``); "control" copies
    them from the control cell that each cell is made from, and is counted in every report.
    """

    seed: int = 0
    scale: Literal["log1p"] = "log1p"
    controls_from: Literal["train", "all"] = "train"
    other_genes: Literal["error", "control"] = "error"
    sets_per_step: PositiveInt = 8


class SubmissionConfig(Section):
    """What goes out: the season, its files, the control cells, and rules overridden by name in `rules`.

    `controls` are copied from the training cells or predicted by the model; `num_controls` of them, or
    `control_share` of the cap.
    """

    season: str = "vcc2025"
    genes: InputPath | None = None
    targets: InputPath | None = None
    context: str | None = None
    controls: Literal["copied", "predicted"] = "copied"
    num_controls: PositiveInt | None = None
    control_share: Share = 0.05
    rules: dict[str, int | str] = {}

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
    """A whole experiment file, resolved: paths are absolute, defaults are filled in."""

    datasets: dict[str, str]
    training: dict[str, Literal["train"]] = {}
    zeroshot: dict[str, Literal["train", "val", "test"]] = {}
    fewshot: dict[str, FewshotConfig] = {}
    columns: ColumnsConfig = ColumnsConfig()
    prepare: PrepareConfig = PrepareConfig()
    features: FeaturesConfig = FeaturesConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    generate: GenerateConfig = GenerateConfig()
    submission: SubmissionConfig = SubmissionConfig()

    @field_validator("datasets")
    @classmethod
    def _patterns_beside_the_file(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        base = _base(info)
        if not value:
            raise ValueError('expected at least one dataset, as `name = "folder, file or pattern"`')
        return {name: str((base / Path(pattern).expanduser()).absolute()) for name, pattern in value.items()}

    def as_json(self) -> dict[str, Any]:
        """Return the resolved configuration as JSON values, as manifests store it."""
        result: dict[str, Any] = self.model_dump(mode="json")
        return result

    def cross_problems(self, place: str) -> list[Problem]:
        """Return what no section can see alone: names that must be datasets, labels that are no target, lost files."""
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
                Problem(f'{place}, "{key}"', "stands in [zeroshot] and in [fewshot]", "leave it in one of them")
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
                        "mend the path (it is relative to the experiment file)",
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
