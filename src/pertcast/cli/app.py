"""The program ``pertcast``: its commands and shared options; errors become one line and an exit code.

Exit codes: 0 done, 1 wrong input or failed check, 2 wrong usage, 130 interrupted with finished work kept. Commands are
imported when they are called, so ``pertcast --help`` never waits for torch.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from pertcast import __version__
from pertcast.errors import PertcastError
from pertcast.files.resources import DISK_FULL
from pertcast.processes import launched

SetOption = Annotated[
    list[str] | None,
    Parameter(
        name="--set", negative="", help="Change one key of the experiment: --set train.steps=100. May be repeated."
    ),
]
RungOption = Annotated[
    Literal["c1", "c2", "c3", "c4"] | None,
    Parameter(
        name="--rung",
        negative="",
        help="A rung of the ladder, as weights of the loss: c1 energy distance, c2 and pseudobulk MAE, c3 and DE head, "
        "c4 and ranking. --set goes on top.",
    ),
]
DevicesOption = Annotated[
    int | None,
    Parameter(
        name="--devices",
        help="Devices of this machine: GPUs, or processes on a CPU. Torchrun and srun say it themselves: leave it out.",
    ),
]
NodesOption = Annotated[
    int | None, Parameter(name="--num-nodes", help="Machines; torchrun and srun, which they need, say it themselves.")
]
ModelOption = Annotated[
    Literal["state", "control", "mean", "ridge", "kernel_ridge", "knn"] | None,
    Parameter(
        name="--model",
        negative="",
        help="What learns: state (the network), or a baseline: control (no effect), mean (the mean effect), ridge, "
        "kernel_ridge, knn (on features). Short for --set model.kind=...; --set goes on top.",
    ),
]
ForceOption = Annotated[
    bool, Parameter(name="--force", negative="", help="Replace a file at --out that pertcast did not write.")
]
RulesOption = Annotated[
    list[str] | None,
    Parameter(
        name="--rule",
        negative="",
        help="Override one rule of the season by name: --rule num_genes=1000. May be repeated.",
    ),
]
SeasonOption = Annotated[str, Parameter(name="--season", help="Which season's rules: vcc2025 or vcc2026.")]
GenesOption = Annotated[Path, Parameter(name="--genes", help="The season's gene_names.csv.")]
TargetsOption = Annotated[Path | None, Parameter(name="--targets", help="The season's target list, pert_counts.csv.")]


def parse_rules(assignments: list[str] | None, *, option: str = "--rule") -> dict[str, int | str]:
    """Return ``["num_genes=1000"]`` as ``{"num_genes": 1000}``."""
    from pertcast.errors import ConfigError, Problem

    rules: dict[str, int | str] = {}
    problems = []
    for assignment in assignments or []:
        name, equals, value = (part.strip() for part in assignment.partition("="))
        if not (name and equals and value):
            example = {"--rule": "num_genes=1000", "--where": "cell_type=H1"}[option]
            problems.append(Problem(f"{option} {assignment}", "expected name=value", f"for example {option} {example}"))
        rules[name] = int(value) if value.lstrip("-").isdigit() else value
    if problems:
        raise ConfigError(problems=problems)
    return rules


_SECONDS_TO_LISTEN = 10.0
_SMALLER = "choose a smaller model (model.hidden, model.layers), fewer sets (train.sets_per_step) or a larger machine"
COMMANDS = {
    "demo": "The whole path on the real cells in the package: minutes on two cores.",
    "run": "Every stage of an experiment, resumable; what is up to date is reused.",
    "prepare": "Experiment file and h5ad files in, a training store out.",
    "train": "Train a model on a store; resumes after an interrupt.",
    "adapt": "Adapt a run to a new cell line from a few of its cells; a handful of parameters learns.",
    "import": "Make a run of a folder that `state tx train` wrote; no code in its files runs.",
    "export": "Write a run as a folder that `state tx infer` reads.",
    "calibrate": "Choose how large effects should be, on targets that were held out of the fit.",
    "generate": "Make exactly the wanted cells of each target, one part file a target.",
    "assemble": "Join the parts into one prediction.h5ad.",
    "check": "Name every problem of a prediction, with its place and remedy.",
    "pack": "Check a prediction and pack it as the season's .vcc archive.",
    "unpack": "Take the h5ad out of a .vcc archive.",
    "score": "Score predicted cells against held-out real ones with the official metrics.",
    "ladder": "List the submissions: what each changed, and what the site said; `ladder record` writes that down.",
    "compare": "Compare rungs, models and experiments on held-out perturbations, with intervals.",
    "report": "Write one self-contained HTML page about a run, which opens offline.",
    "sample": "Write a valid submission of random cells, to try the upload with.",
    "verify": "Tell whether an artefact is whole and still what its manifest says.",
}
_LADDER_COMMANDS = ("score", "compare", "calibrate", "adapt", "ladder", "report")


def build_app(asked: str | None = None) -> App:
    """Return the program; the command `asked` shows its whole docstring, the others one line."""
    app = App(
        name="pertcast",
        help="Forecast how single cells respond to gene perturbations, and pack a valid challenge submission.\n\n"
        "The path: prepare, train, generate, assemble, check, pack; `pertcast run` does them all.\n\n"
        "Example: `pertcast demo`",
        version=__version__,
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    for name, summary in COMMANDS.items():
        function = {"ladder": "ladder_app", "import": "import_run"}.get(name, name)
        module = "ladder" if name in _LADDER_COMMANDS else "pipeline"
        app.command(f"pertcast.cli.{module}:{function}", name=name, help=None if name == asked else summary)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program with these arguments (default: the process's) and exit with its code."""
    sys.exit(_run(sys.argv[1:] if arguments is None else list(arguments)))


_RENAMED_OPTIONS = {
    ("check", "--set"): "--rule",
    ("pack", "--set"): "--rule",
    ("sample", "--set"): "--rule",
    ("score", "--set"): "--rule",
    ("score", "--train"): "--baseline-from",
    ("adapt", "--learn"): "--trainable",
}


def _name_renamed_options(arguments: list[str]) -> None:
    """Print the new name of an option that was given by its earlier name."""
    for (command, old), new in _RENAMED_OPTIONS.items():
        if arguments[:1] == [command] and any(argument.partition("=")[0] == old for argument in arguments):
            print(f"pertcast: {old} of `pertcast {command}` is now called {new}", file=sys.stderr)


def _run(arguments: list[str]) -> int:
    # set variables that libraries read when they are loaded, unless the user has set them
    # torch allocates large tensors in large pages, which takes a tenth of the time
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "GOMP_SPINCOUNT" not in os.environ:
        # a thread that waits sleeps; threads that spin take the processor from those that work, if anything else runs
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal with few characters shows a question mark instead of an error
            stream.reconfigure(errors="replace")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for category in (DeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)  # for developers of pertcast, whose tests turn them into errors
    try:
        code = build_app(next(iter(arguments), None))(arguments or ["--help"], exit_on_error=False, print_error=True)
    except CycloptsError:
        _name_renamed_options(arguments)
        return 2
    except PertcastError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted; finished work is kept. Run the same command again to resume", 130)
    except BrokenPipeError:
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}; {_remedy(error)}", 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or _ran_out_of_memory(error):
            return _fail(
                f"not enough memory ({str(error).splitlines()[0] if str(error) else 'MemoryError'}); {_SMALLER}", 1
            )
        raise
    return code if isinstance(code, int) else 0


def _remedy(error: OSError) -> str:
    if error.errno in DISK_FULL:
        return "free some space or give another --out, then try again"
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return "give another --out that you may write, or change its permissions"
    return "check the path, or give another one"


def _ran_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an allocation failed: a RuntimeError on a CPU, torch's own class on a GPU."""
    text = str(error).lower()
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text or "out of memory" in text


def _fail(message: str, code: int) -> int:
    try:
        ranks = launched()
    except PertcastError:
        ranks = None
    if ranks is not None and ranks.rank:
        # The first process reports an error that all have, and the launcher ends the others. A process that is still
        # running after a while has an error of its own.
        time.sleep(_SECONDS_TO_LISTEN)
        message = f"{ranks}: {message}"
    print(f"pertcast: {message}", file=sys.stderr)
    return code
