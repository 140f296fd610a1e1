"""What every section of the experiment file is made of: strict, frozen, and paths that are relative to the file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

__all__ = ["InputPath", "Section", "Share", "Weight", "base_folder"]

Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]


def _beside_the_file(path: Path, info: ValidationInfo) -> Path:
    return (base_folder(info) / path.expanduser()).absolute()


def base_folder(info: ValidationInfo) -> Path:
    """Return the folder that relative paths are relative to: the experiment file's, or the working folder."""
    base: Path = (info.context or {}).get("base", Path())
    return base


InputPath = Annotated[Path, AfterValidator(_beside_the_file)]


class Section(BaseModel):
    """A section of the experiment file: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
