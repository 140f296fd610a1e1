"""What every section of the experiment file is made of: strict, frozen, and paths that are relative to the file."""

from __future__ import annotations

import itertools
import logging
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

__all__ = ["InputPath", "Section", "Share", "Weight", "resolve_path"]

logger = logging.getLogger(__name__)

Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]


def _beside_the_file(path: Path, info: ValidationInfo) -> Path:
    return Path(resolve_path(str(path), info))


def resolve_path(path: str, info: ValidationInfo) -> str:
    """Return a path or pattern of an experiment file, absolute: relative to the file, or to the working folder.

    The working folder counts where the first folder or file of the path is there alone; a warning says so.
    """
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
