"""Which keys of an experiment each command uses, and how two experiments are compared, key by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pertcast.errors import Problem

__all__ = ["COMMANDS_WITH_SET", "STORE_KEYS", "differences", "flat", "unused_problem", "uses", "value_at"]

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

# A section stands for all of its keys. What `train` and `adapt` record in the run for `generate` counts as used.
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
        "generate.spread",
        "generate.calibrated",
        "generate.centred",
        "generate.controls_from",
        "generate.other_genes",
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
    """Return whether a command does anything with a key such as ``train.steps``, for what learns.

    Examples
    --------
    >>> uses("train", "train.steps"), uses("train", "train.steps", kind="mean"), uses("generate", "train.steps")
    (True, False, False)
    """
    if not _covers(_USED[command], key) or _covers(_NOT_USED.get(command, ()), key):
        return False
    if kind != "state" and command != "compare" and key.split(".")[0] in ("model", "loss", "train"):
        return _covers(_BASELINE_USES, key)
    return True


def unused_problem(command: str, key: str, *, kind: str) -> Problem:
    """Return what to tell about a key that a command was given and does not use."""
    if uses(command, key):
        message = f"model.kind = {kind!r} does not use it"
        return Problem(f"--set {key}", message, "leave it out, or choose a model that does")
    others = [name for name in COMMANDS_WITH_SET if uses(name, key)]
    remedy = f"give it to {' or '.join(f'`pertcast {name}`' for name in others)}" if others else "leave it out"
    return Problem(f"--set {key}", f"`pertcast {command}` does not use it", remedy)


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``a.b`` and value of every leaf; an empty table is a leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def value_at(tree: Mapping[str, Any], key: str) -> Any:
    """Return the value of ``a.b``; ``None`` where there is none."""
    node: Any = tree
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str], *, what: str, remedy: str = ""
) -> list[Problem]:
    """Return a problem for each key under some keys or sections that has another value now.

    Parameters
    ----------
    before, now
        Two experiments as JSON values.
    keys
        Sections, or keys as ``section.key``.
    what
        What `before` belongs to, for the message.
    remedy
        What the user can do.
    """
    problems = []
    for key in keys:
        pair = [dict(flat({key: value_at(tree, key)})) for tree in (before, now)]
        for name in sorted({*pair[0], *pair[1]}):
            old, new = (values.get(name) for values in pair)
            if old != new:
                problems.append(Problem(name, f"{what} with {old!r}, and the experiment says {new!r}", remedy))
    return problems
