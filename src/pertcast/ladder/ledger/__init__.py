"""Which submissions there are, what each was made by, and what the site said of it."""

from pertcast.ladder.ledger.difference import Change, compare_scores, difference
from pertcast.ladder.ledger.records import METRICS, Metric, Record, read_records, record_scores, scores_path
from pertcast.ladder.ledger.status import read_status
from pertcast.ladder.ledger.submission import Submission
from pertcast.ladder.ledger.table import Ledger, TradeOff, find_submission, read_ledger

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
