"""A prediction in, every problem out, each with its place and remedy: one file for each family of rules."""

from __future__ import annotations

from pertcast.submission.check.report import CheckItem, CheckReport
from pertcast.submission.check.whole import check

__all__ = ["CheckItem", "CheckReport", "check"]
