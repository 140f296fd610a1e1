"""The names that users import are pinned: a change here is a change of the interface."""

import subprocess
import sys

import pertcast

NAMES = [
    "CheckReport", "CheckpointError", "ConfigError", "DataError", "Experiment", "PertcastError", "Problem",
    "RealismReport", "SEASONS", "Season", "Store", "SubmissionError", "__version__", "adapt_run", "adapted_experiment",
    "assemble", "check", "generate_parts", "load_experiment", "pack", "prepare", "read_ledger", "realism",
    "run_experiment", "season", "train_run", "unpack", "write_report",
]  # fmt: skip


def test_public_names_are_these_and_all_import() -> None:
    assert sorted(pertcast.__all__) == NAMES
    for name in NAMES:
        assert getattr(pertcast, name) is not None


def test_importing_the_package_or_a_submission_stage_imports_no_torch() -> None:
    code = (
        "import sys, pertcast, pertcast.submission.check, pertcast.submission.pack, pertcast.submission.assemble;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_a_run_of_arc_state_imports_no_training() -> None:
    code = "import sys, pertcast.arc.import_export; sys.exit('lightning_fabric' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
