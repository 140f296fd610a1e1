"""What is imported ahead is what is slow to import, and leaves the interpreter as it was."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pertcast
from pertcast.ahead import import_ahead

SOURCES = Path(pertcast.__file__).parent
AHEAD = sorted(
    {
        name
        for path in SOURCES.rglob("*.py")
        if path.name != "ahead.py"
        for name in re.findall(r'import_ahead\("([\w.]+)"\)', path.read_text())
    }
)


def test_something_is_imported_ahead() -> None:
    assert AHEAD


@pytest.mark.parametrize("module", AHEAD)
def test_a_module_that_is_imported_ahead_brings_the_large_ones(module: str) -> None:
    code = f"import sys; from pertcast.ahead import import_ahead; import_ahead({module!r}).join(); " + (
        "sys.exit(not {'torch', 'lightning_fabric'} <= set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_threads_take_turns_as_before_when_it_is_done() -> None:
    before = sys.getswitchinterval()
    import_ahead("colorsys").join()
    assert sys.getswitchinterval() == before
    import_ahead("no_such_module").join()
    assert sys.getswitchinterval() == before
