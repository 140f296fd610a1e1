"""The command line as the product: every command has help with an example, exit codes mean what they say."""

import subprocess
import sys
from pathlib import Path

import pytest

from pertcast.cli.app import COMMANDS, main


def call(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, out, err


def test_help_lists_every_command_and_imports_neither_torch_nor_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call("--help", capsys=capsys)
    assert code == 0
    assert all(command in out for command in COMMANDS)
    heavy = ("torch", "numpy", "anndata", "pydantic", "pertcast.data", "pertcast.config")
    script = f"""
import sys
from pertcast.cli.app import main
try:
    main(["--help"])
except SystemExit:
    pass
print("imported:", [name for name in {heavy!r} if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("imported: []\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(command, "--help", capsys=capsys)
    assert code == 0
    assert f"Example: pertcast {command}" in " ".join(out.split())


@pytest.mark.parametrize("arguments", [("nonsense",), ("check",), ("prepare", "x.toml"), ("train", "--nonsense")])
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(*arguments, capsys=capsys)
    assert code == 2
    assert err


@pytest.mark.parametrize(
    ("arguments", "new"),
    [
        (("check", "p.h5ad", "--genes", "g.csv", "--set", "num_genes=1"), "--rule"),
        (("score", "p.h5ad", "r.h5ad", "--train", "t.h5ad"), "--baseline-from"),
        (("adapt", "run", "line.toml", "--out", "a", "--learn=offset"), "--trainable"),
    ],
)
def test_an_option_with_a_new_name_is_told(
    arguments: tuple[str, ...], new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(*arguments, capsys=capsys)
    assert code == 2
    assert f"of `pertcast {arguments[0]}` is now called {new}" in err


def test_wrong_input_is_exit_code_1_and_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call("prepare", str(tmp_path / "none.toml"), "--out", str(tmp_path / "store"), capsys=capsys)
    assert (code, out) == (1, "")
    assert err.startswith("pertcast: ")
    assert "no such experiment file" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pertcast.config.load_experiment", interrupt)
    code, _, err = call("prepare", "x.toml", "--out", "store", capsys=capsys)
    assert code == 130
    assert "same command again" in err
