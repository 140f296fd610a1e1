"""Read an experiment file and ``--set`` overrides into one experiment, or report every problem."""

from __future__ import annotations

import copy
import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pertcast.config.sections import Experiment, FewshotConfig, LossConfig
from pertcast.errors import ConfigError, Problem

RUNGS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "c1": {"energy": 1.0, "mae": 0.0, "de": 0.0, "rank": 0.0},
        "c2": {"energy": 1.0, "mae": 10.0, "de": 0.0, "rank": 0.0},
        "c3": {"energy": 1.0, "mae": 10.0, "de": 0.2, "rank": 0.0},
        "c4": {"energy": 1.0, "mae": 10.0, "de": 0.2, "rank": 1.0},
    }
)


def rung_overrides(rung: str | None) -> tuple[str, ...]:
    """Return a rung as ``section.key=value`` overrides that come before the user's own; none for ``None``.

    >>> rung_overrides("c2")
    ('loss.energy=1.0', 'loss.mae=10.0', 'loss.de=0.0', 'loss.rank=0.0')
    """
    return () if rung is None else tuple(f"loss.{name}={weight}" for name, weight in RUNGS[rung].items())


def model_overrides(kind: str | None) -> tuple[str, ...]:
    """Return a model kind as an override that comes before the user's own; none for ``None``.

    >>> model_overrides("ridge")
    ('model.kind=ridge',)
    """
    return () if kind is None else (f"model.kind={kind}",)


def rung_of(loss: Mapping[str, object]) -> str:
    """Return the rung that these loss weights belong to, or ``"other"``; missing weights are the defaults.

    >>> rung_of({"energy": 1.0, "mae": 10.0}), rung_of({"mae": 0.3})
    ('c2', 'other')
    """
    whole = {**LossConfig().model_dump(mode="json"), **loss}
    return next(
        (name for name, weights in RUNGS.items() if all(whole[key] == weights[key] for key in weights)), "other"
    )


RENAMED: Mapping[str, str] = {
    "train.unknown_batch": "train.batch_dropout",
    "generate.spread": "generate.residual_scale",
    "generate.centred": "generate.subtract_control_prediction",
    "generate.other_genes": "generate.unpredicted_genes",
    "adapt.learn": "adapt.trainable",
}
"""Earlier names of settings: an error in an experiment file, read from artefacts."""

STORE_KEYS = (
    "datasets",
    "training",
    "zeroshot",
    "fewshot",
    "columns",
    "prepare",
    "submission.genes",
    "submission.season",
    "submission.rules",
    "model.input",
)
"""What a store depends on; of ``model.input`` only which embedding, if it is one."""

# A section covers all of its keys. What `train` and `adapt` record in the run for `generate` counts as used.
_USED: Mapping[str, tuple[str, ...]] = {
    "prepare": (*STORE_KEYS, "train.match"),
    "train": (*STORE_KEYS, "features", "model", "loss", "train", "generate", "submission"),
    "adapt": (*STORE_KEYS, "features.path", "model", "loss", "train", "adapt", "generate", "submission"),
    "generate": ("features.path", "features.missing", "generate", "submission"),
    "calibrate": ("generate",),
    "compare": (*STORE_KEYS, "features", "model", "loss", "train", "generate"),
    "run": (*STORE_KEYS, "features", "model", "loss", "train", "generate", "submission"),
    "demo": (*STORE_KEYS, "features", "model", "loss", "train", "generate", "submission"),
}
# What a command decides itself.
_NOT_USED: Mapping[str, tuple[str, ...]] = {
    "adapt": (
        "train.steps",
        "train.learning_rate",
        "train.val_every",
        "train.patience",
        "train.weight_decay",
        "train.devices",
        "train.num_nodes",
        "train.strategy",
        "train.select_by",
        "loss.warmup_steps",
    ),
    "calibrate": (
        "generate.scale",
        "generate.residual_scale",
        "generate.calibrated",
        "generate.subtract_control_prediction",
        "generate.controls_from",
        "generate.unpredicted_genes",
        "generate.sets_per_step",
    ),
    "compare": (
        "train.seed",
        "generate.seed",
        "submission.targets",
        "submission.context",
        "submission.dataset",
        "submission.controls",
        "submission.num_controls",
        "submission.control_share",
    ),
}
# A baseline is fitted: nothing of it is trained by steps.
_BASELINE_USES = ("model.kind", "model.preset", "model.set_size", "model.output", "train.match", "train.devices")
COMMANDS_WITH_SET = tuple(_USED)


def _covers(keys: Sequence[str], key: str) -> bool:
    return any(key == one or key.startswith(f"{one}.") or one.startswith(f"{key}.") for one in keys)


def uses(command: str, key: str, *, kind: str = "state") -> bool:
    """Return whether a command uses a key such as ``train.steps``, for a kind of model.

    >>> uses("train", "train.steps"), uses("train", "train.steps", kind="mean"), uses("generate", "train.steps")
    (True, False, False)
    """
    if not _covers(_USED[command], key) or _covers(_NOT_USED.get(command, ()), key):
        return False
    if kind != "state" and command != "compare" and key.split(".")[0] in ("model", "loss", "train"):
        return _covers(_BASELINE_USES, key)
    return True


def unused_problem(command: str, key: str, *, kind: str) -> Problem:
    """Return the problem of a key that the command does not use."""
    if uses(command, key):
        message = f"model.kind = {kind!r} does not use it"
        return Problem(f"--set {key}", message, "remove it, or choose a model that uses it")
    others = [name for name in COMMANDS_WITH_SET if uses(name, key)]
    remedy = f"give it to {' or '.join(f'`pertcast {name}`' for name in others)}" if others else "leave it out"
    return Problem(f"--set {key}", f"`pertcast {command}` does not use it", remedy)


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``a.b`` and value of every leaf. An empty table is a leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def value_at(tree: Mapping[str, Any], key: str) -> Any:
    """Return the value of ``a.b``, or ``None``."""
    node: Any = tree
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str], *, what: str, remedy: str = ""
) -> list[Problem]:
    """Return a problem for each key below some keys or sections whose value has changed."""
    problems = []
    for key in keys:
        pair = [dict(flat({key: value_at(tree, key)})) for tree in (before, now)]
        for name in sorted({*pair[0], *pair[1]}):
            old, new = (values.get(name) for values in pair)
            if old != new:
                problems.append(Problem(name, f"{what} with {old!r}, and the experiment says {new!r}", remedy))
    return problems


def _split_key(key: str) -> list[str]:
    """Split ``a.b`` into its parts. A name that contains a dot is quoted, as in TOML: fewshot."h1.k562".val."""
    return [part.strip().strip("\"'") for part in re.findall(r"\"[^\"]*\"|'[^']*'|[^.\"']+|(?<=\.)(?=\.|$)", key)]


def _set_key(tree: dict[str, Any], assignment: str) -> Problem | None:
    """Apply one ``a.b=value``. The value is TOML, or a plain string if it does not parse."""
    key, equals, text = assignment.partition("=")
    parts = _split_key(key)
    if not equals or not parts or not all(parts):
        return Problem(f"--set {assignment}", "expected section.key=value", "for example --set train.steps=100")
    try:
        value: Any = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if isinstance(value, str) and _is_path(parts):
        value = str(Path(value).expanduser().absolute())  # a typed path is relative to the working folder
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            return Problem(f"--set {assignment}", f"{part!r} is no section", "name a key of a section, as train.steps")
    node[parts[-1]] = value
    return None


def _is_path(parts: Sequence[str]) -> bool:
    """Return whether a key names a file or folder."""
    if parts[0] == "datasets":
        return True
    section = Experiment.model_fields.get(parts[0])
    model = section.annotation if section is not None and len(parts) == 2 else None
    if not (isinstance(model, type) and issubclass(model, BaseModel)) or parts[1] not in model.model_fields:
        return False
    kind = model.model_fields[parts[1]].annotation
    kinds = {kind, *get_args(kind), *(inner for outer in get_args(kind) for inner in get_args(outer))}
    return Path in kinds


def _place(path: Path, text: str, location: Sequence[str | int]) -> str:
    """Return ``file:line, [section] key`` for a place in the tree, with the line if the text has it."""
    parts = [str(part) for part in location]
    section, key = (parts[0], ".".join(parts[1:])) if parts else ("", "")
    line_number, inside = None, False
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[([^\]]+)\]", line)
        if header:
            inside = header[1].split(".")[0].strip("\" '") == section
            line_number = number if inside and line_number is None else line_number
        elif inside and len(parts) > 1 and re.match(rf"""\s*["']?{re.escape(parts[-1])}["']?\s*=""", line):
            line_number = number
            break
    at = f":{line_number}" if line_number else ""
    return f"{path}{at}, [{section}] {key}".rstrip()


def _known_keys(location: Sequence[str | int]) -> list[str]:
    model: type[BaseModel] = Experiment
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return list(FewshotConfig.model_fields) if location[0] == "fewshot" else []
        model = field.annotation
    return list(model.model_fields)


def _as_problems(path: Path, text: str, errors: Sequence[ErrorDetails]) -> list[Problem]:
    """Return one problem for each place; the failed branches of a union become one sentence."""
    places: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
    for error in errors:
        location = tuple(
            part for part in error["loc"] if not re.match(r"(literal\[|constrained-|float$|int$|str$)", str(part))
        )
        places.setdefault(location, []).append(error)
    return [_as_problem(_place(path, text, location), location, group) for location, group in places.items()]


def _as_problem(place: str, location: Sequence[str | int], errors: Sequence[ErrorDetails]) -> Problem:
    first = errors[0]
    if first["type"] == "extra_forbidden":
        dotted = ".".join(map(str, location))
        if dotted in RENAMED:
            return Problem(place, f"{location[-1]!r} has a new name", f"write {RENAMED[dotted]}")
        known = _known_keys(location)
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return Problem(place, f"unknown key {location[-1]!r}", remedy)
    message = " or ".join(error["msg"].removeprefix("Value error, ") for error in errors)
    message = message[:1].lower() + message[1:].replace(" or Input should be", " or")
    if first["type"] in ("missing", "value_error"):
        return Problem(place, message, "add it" if first["type"] == "missing" else "")
    return Problem(place, f"{message}, got {first['input']!r}", "correct the value")


def load_experiment(path: Path, overrides: Sequence[str] = (), *, command: str | None = None) -> Experiment:
    """Read an experiment file, apply ``a.b=value`` overrides, and return it resolved.

    Overrides that a command does not use are refused, where it is named.

    Raises
    ------
    ConfigError
        With every problem at once: each unknown key, wrong type, unknown name and missing file, with its place.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such experiment file; give the path of a TOML file, as recipes/demo.toml"
        ) from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a TOML text file ({error}); give the path of an experiment file") from None
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}; correct the file there") from None
    return _resolve(tree, overrides, path=path, text=text, command=command)


def rebuild_experiment(
    tree: Mapping[str, Any], overrides: Sequence[str] = (), *, place: Path, command: str | None = None
) -> Experiment:
    """Rebuild the experiment that an artefact stores as JSON, with overrides; errors name `place`."""
    return _resolve(upgrade(tree), overrides, path=place, text="", command=command)


def upgrade(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that an earlier version stored, with today's names of settings."""
    upgraded = copy.deepcopy(dict(tree))
    for old, new in RENAMED.items():
        section, _, key = old.partition(".")
        if key in (upgraded.get(section) or {}):
            upgraded[section][new.partition(".")[2]] = upgraded[section].pop(key)
    if (upgraded.get("loss") or {}).get("mae_of") == "effect":
        del upgraded["loss"]["mae_of"]
    return upgraded


def _resolve(
    tree: dict[str, Any], overrides: Sequence[str], *, path: Path, text: str, command: str | None
) -> Experiment:
    problems = [problem for problem in (_set_key(tree, item) for item in overrides) if problem]
    if command is not None:
        kind = str(value_at(tree, "model.kind") or "state")
        keys = [".".join(_split_key(item.partition("=")[0])) for item in overrides]
        problems += [
            unused_problem(command, key, kind=kind)
            for key in keys
            if key not in RENAMED and not uses(command, key, kind=kind)
        ]
    try:
        as_json = json.dumps(tree, default=str)
        experiment = Experiment.model_validate_json(as_json, context={"base": path.resolve().parent})
    except ValidationError as error:
        problems += _as_problems(path, text, error.errors())
    else:
        problems += experiment.cross_problems(str(path))
    if problems:
        raise ConfigError(f"{path}: {len(problems)} problem(s) in the experiment", problems=problems)
    return experiment
