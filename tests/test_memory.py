from __future__ import annotations

import subprocess
import sys

import pytest

from pertcast.files.memory import keep_freed_memory

CODE = """
import resource
import numpy as np
from pertcast.files.memory import keep_freed_memory
assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 22, dtype=np.float32)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
again = max(faults() for _ in range(3))
assert again < 16, (first, again)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a matter of glibc")
def test_freed_memory_is_used_again_without_new_pages() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True)


def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
