"""Check a prediction and report every problem with its place and remedy; one file for each family of rules."""

from __future__ import annotations

from pertcast.submission.check.check import check
from pertcast.submission.check.report import CheckItem, CheckReport

__all__ = ["CheckItem", "CheckReport", "check"]
