"""How like real cells a prediction's cells are; behind ``pertcast check --against``."""

from pertcast.submission.realism.compare import realism
from pertcast.submission.realism.report import ContextRealism, RealismReport

__all__ = ["ContextRealism", "RealismReport", "realism"]
