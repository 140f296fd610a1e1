"""Short words for overrides: the rungs of the ladder, each one more term of the loss than the one before; the model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pertcast.config.learning import LossConfig

__all__ = ["RUNGS", "model_overrides", "rung_of", "rung_overrides"]

RUNGS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "c1": {"energy": 1.0, "mae": 0.0, "de": 0.0, "rank": 0.0},
        "c2": {"energy": 1.0, "mae": 10.0, "de": 0.0, "rank": 0.0},
        "c3": {"energy": 1.0, "mae": 10.0, "de": 0.2, "rank": 0.0},
        "c4": {"energy": 1.0, "mae": 10.0, "de": 0.2, "rank": 1.0},
    }
)


def rung_overrides(rung: str | None) -> tuple[str, ...]:
    """Return a rung as ``section.key=value`` overrides, to go before the user's own; none for ``None``.

    Examples
    --------
    >>> rung_overrides("c2")
    ('loss.energy=1.0', 'loss.mae=10.0', 'loss.de=0.0', 'loss.rank=0.0')
    """
    return () if rung is None else tuple(f"loss.{name}={weight}" for name, weight in RUNGS[rung].items())


def model_overrides(kind: str | None) -> tuple[str, ...]:
    """Return what learns as a ``section.key=value`` override, to go before the user's own; none for ``None``.

    Examples
    --------
    >>> model_overrides("ridge")
    ('model.kind=ridge',)
    """
    return () if kind is None else (f"model.kind={kind}",)


def rung_of(loss: Mapping[str, object]) -> str:
    """Return the rung that these weights of the loss are of, or ``"other"``; what is not given is the default.

    Examples
    --------
    >>> rung_of({"energy": 1.0, "mae": 10.0}), rung_of({"mae": 0.3})
    ('c2', 'other')
    """
    whole = {**LossConfig().model_dump(mode="json"), **loss}
    return next(
        (name for name, weights in RUNGS.items() if all(whole[key] == weights[key] for key in weights)), "other"
    )
