"""One self-contained HTML page about a run: training, predictions and scores."""

from pertcast.ladder.report.page import write_report

__all__ = ["write_report"]
