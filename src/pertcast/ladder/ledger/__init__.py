"""The ledger of submissions: what made each, and what the site said."""

from pertcast.ladder.ledger.ledger import (
    Change,
    Ledger,
    TradeOff,
    compare_scores,
    difference,
    find_submission,
    read_ledger,
)
from pertcast.ladder.ledger.scores import METRICS, Metric, Record, read_records, read_status, record_scores, scores_path
from pertcast.ladder.ledger.submissions import Submission

__all__ = [
    "METRICS",
    "Change",
    "Ledger",
    "Metric",
    "Record",
    "Submission",
    "TradeOff",
    "compare_scores",
    "difference",
    "find_submission",
    "read_ledger",
    "read_records",
    "read_status",
    "record_scores",
    "scores_path",
]
