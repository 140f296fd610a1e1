"""Inputs that a fuzzer found, and broken files made by hand: each ends in an error of ours or in a result."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

CORPUS = Path(__file__).parent / "corpus"
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"
SPEC = importlib.util.spec_from_file_location("fuzz", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
FUZZ = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(FUZZ)


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_an_input_of_the_corpus_is_read_or_refused(path: Path) -> None:
    FUZZ.TARGETS[path.parent.name](path.read_bytes())


def test_the_corpus_is_there_and_small() -> None:
    sizes = [path.stat().st_size for path in CORPUS.glob("*/*")]
    assert len(sizes) >= 10
    assert sum(sizes) < 200_000
