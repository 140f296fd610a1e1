"""Runs an official packer over cases: ``python agreement_official.py vcc|cell_eval < cases.json > verdicts.json``.

With ``read_vcc`` it has the official reader of archives look at the case's own archive instead, and tells what it read.

It imports nothing of pertcast, so that it also runs in the environment of the official tool.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

Case = dict[str, Any]


def run_vcc(case: Case) -> None:
    limits = case["limits"]
    importlib.import_module("vcc.prep").run_prep(
        input_path=case["input"],
        genes_path=case["genes"],
        perts_path=case["targets"],
        output_path=case["output"],
        verify_targets=case["targets"] is not None,
        cells_per_pert=limits["cells_per_target"],
        required_contexts=tuple(case["contexts"].split(",")),
        expected_gene_dim=limits["num_genes"],
        max_cell_dim=limits["max_cells"],
        max_nnz=limits["max_stored_values"],
        max_counts_per_cell=limits["max_cell_sum"],
    )


def run_cell_eval(case: Case) -> None:
    prep = importlib.import_module("cell_eval._cli._prep")
    parser = argparse.ArgumentParser()
    prep.parse_args_prep(parser)
    files = ["-i", case["input"], "-g", case["genes"], "-o", case["output"]]
    limits = ["--expected-gene-dim", case["limits"]["num_genes"], "--max-cell-dim", case["limits"]["max_cells"]]
    prep.run_prep(parser.parse_args([str(argument) for argument in files + limits]))


def read_vcc(case: Case) -> dict[str, object]:
    """Return what the official tools take from an archive before they upload it; an archive that they refuse raises."""
    vccfile = importlib.import_module("vcc.vccfile")
    path = case["archive"]
    vccfile.validate_vcc(path)
    contexts = vccfile.contexts_from_vcc(path)
    return {"meta": vccfile.read_vcc_meta(path), "nnz": vccfile.nnz_from_vcc(path), "contexts": contexts}


def verdict(run: Callable[[Case], None], case: Case) -> str:
    """Return ``accepted``, or ``refused`` with the first line of the reason."""
    try:
        run(case)
    except Exception as error:  # noqa: BLE001 (whatever the official tool raises, it has refused the file)
        return f"refused: {type(error).__name__}: {str(error).partition(chr(10))[0][:150]}"
    return "accepted" if Path(case["output"]).is_file() else "refused: there is no archive"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with redirect_stdout(sys.stderr):
        asked = json.load(sys.stdin)
        said: dict[str, object]
        if sys.argv[1] == "read_vcc":
            said = {name: read_vcc(case) for name, case in asked.items()}
        else:
            run = {"vcc": run_vcc, "cell_eval": run_cell_eval}[sys.argv[1]]
            said = {name: verdict(run, case) for name, case in asked.items()}
    json.dump(said, sys.stdout)
