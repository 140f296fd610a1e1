"""The report in a real browser: headless Chromium draws it, at the width of a desk and of a phone, without an error."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pertcast.ladder.report import write_report
from pertcast.pipeline import run_experiment
from workspace import Workspace, make_workspace

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt install chromium)")

# shows the page at a width, chooses another target, and writes what it saw into itself
HARNESS = """<!DOCTYPE html><html><body><pre id="seen"></pre>
<iframe id="page" src="report.html" style="border:0;width:WIDTHpx;height:2000px"></iframe>
<script>
  const frame = document.getElementById("page");
  frame.addEventListener("load", function () {
    const waiting = setInterval(function () {
      const page = frame.contentDocument;
      if (!page.documentElement.dataset.drawn) { return; }
      clearInterval(waiting);
      const choice = page.getElementById("volcano-predicted-choice");
      const marks = function () { return page.querySelector("#volcano-predicted .scatterlayer").innerHTML; };
      const before = marks();
      choice.focus();
      const focused = page.activeElement === choice;
      choice.value = choice.options[1].value;
      choice.dispatchEvent(new Event("change"));
      const other = page.getElementById("volcano-training-choice").value;
      setTimeout(function () {
        document.getElementById("seen").textContent = JSON.stringify({
          drawn: Number(page.documentElement.dataset.drawn), plots: page.querySelectorAll(".plot .main-svg").length > 0,
          empty: page.querySelectorAll(".plot:not(:has(.main-svg))").length,
          wide: page.documentElement.scrollWidth - page.documentElement.clientWidth,
          redrawn: marks() !== before, focused: focused, other: other === choice.value
        });
      }, 200);
    }, 50);
  });
</script></body></html>
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a small run."""
    workspace: Workspace = make_workspace(tmp_path_factory.mktemp("browser") / "w")
    run_experiment(workspace.experiment, workspace.out)
    return write_report(workspace.out)


@pytest.mark.parametrize("width", [390, 1280])
def test_chromium_draws_the_page_without_an_error(report: Path, width: int) -> None:
    harness = report.parent / f"harness-{width}.html"
    harness.write_text(HARNESS.replace("WIDTH", str(width)), encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        "--enable-logging=stderr", f"--window-size={width + 20},2100", "--virtual-time-budget=10000", "--dump-dom",
        f"--user-data-dir={report.parent / f'profile-{width}'}", harness.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert said == []
    seen = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)
    assert seen is not None
    assert json.loads(seen[1]) == {
        "drawn": 8, "plots": True, "empty": 0, "wide": 0, "redrawn": True, "focused": True, "other": True
    }  # fmt: skip
