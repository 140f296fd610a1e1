"""One self-contained HTML page about a run: what was trained, what was predicted, and what came back."""

from pertcast.ladder.report.page import write_report

__all__ = ["write_report"]
