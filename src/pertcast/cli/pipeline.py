"""The commands of the pipeline, from prepare to pack, and run, demo, import, export, sample and verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from pertcast.cli.app import (
    DevicesOption,
    ForceOption,
    GenesOption,
    ModelOption,
    NodesOption,
    RulesOption,
    RungOption,
    SeasonOption,
    SetOption,
    TargetsOption,
    parse_rules,
)

if TYPE_CHECKING:
    from pertcast.stats.realism import Likeness
    from pertcast.submission.check import CheckReport
    from pertcast.submission.check.realism import RealismReport


def assemble(parts: Path, /, *, out: Path, force: ForceOption = False) -> None:
    """Join the parts and the control cells into one h5ad: the exact genes, float32, one scale.

    Example: `pertcast assemble parts --out prediction.h5ad`

    Parameters
    ----------
    parts
        The folder that `pertcast generate` wrote.
    out
        The prediction, an h5ad file.
    """
    from pertcast.cli.console import Console
    from pertcast.submission.assemble import assemble as join

    print(join(parts, out, force=force, progress=Console()))


def check(
    file: Path,
    /,
    *,
    season: SeasonOption = "vcc2025",
    genes: GenesOption,
    targets: TargetsOption = None,
    set_: RulesOption = None,
    against: Annotated[Path | None, Parameter(name="--against")] = None,
    where: Annotated[list[str] | None, Parameter(name="--where", negative="")] = None,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Report every problem of a prediction, with its place and remedy. The exit code is 1 if there is one.

    Example: `pertcast check prediction.h5ad --genes gene_names.csv --targets pert_counts_Validation.csv`

    Parameters
    ----------
    file
        The prediction, an h5ad file.
    against
        Real control cells, an h5ad file: says how real the cells look beside them (DE calls without an effect,
        variance, zeros, depth) and writes realism.json beside the prediction. The exit code does not depend on it.
    where
        Which cells of that file are compared, as column=label; may be repeated. Default: those of the context that
        the prediction's manifest names, where the file has several.
    json_
        Print the report as JSON.
    """
    from pertcast.cli.console import Console
    from pertcast.submission.check import check as examine

    report = examine(file, season=season, genes=genes, targets=targets, rules=parse_rules(set_), progress=Console())
    found = None
    if against is not None and report.facts.get("cells"):
        from pertcast.files.artefacts import require_replaceable, write_json
        from pertcast.submission.check.realism import realism

        labels = {column: str(label) for column, label in parse_rules(where, option="--where").items()}
        found = realism(file, against, season=season, rules=parse_rules(set_), where=labels or None, progress=Console())
        kept = file.with_name("realism.json")
        require_replaceable(kept, force=False)
        write_json(kept, {"made_by": "pertcast", **found.as_json()})
    if json_:
        print(json.dumps(report.as_json() | ({"realism": found.as_json()} if found else {}), indent=1))
        return 0 if report.ok else 1
    print_report(report)
    if found:
        print_realism(found)
    return 0 if report.ok else 1


def print_report(report: CheckReport) -> None:
    """Print a check report: the pre-flight questions, then every problem."""
    for item in report.checklist:
        mark = {True: "✓", False: "✗", None: "–"}[item.ok]
        print(f"{mark} {item.question}: {item.evidence}")
    for note in report.notes:
        print(f"· {note}")
    for problem in report.problems:
        print(f"  - {problem}")
    print("valid" if report.ok else f"not valid: {len(report.problems)} problem(s)")


def print_realism(report: RealismReport) -> None:
    """Print how realistic the cells are: one line for each kind of cells, then the verdicts."""
    for part in report.contexts:
        print(
            f"\nhow real the cells look{f', context {part.context}' if part.context else ''}, beside {report.against}:"
        )
        rows: dict[str, Likeness | None] = {"real": part.real, "null": part.null, "targets": part.targets}
        names = {"real": "real controls", "null": "controls of the prediction", "targets": "targets, median"}
        for name, like in rows.items():
            if like is not None:
                depth = f", median depth {part.totals[name][1]:,.0f}" if name in part.totals else ""
                print(
                    f"  {names[name]}: {like.de_calls} DE genes, variance x{like.variance_ratio[1]:.2f}, "
                    f"zeros {100 * like.zero_difference[1]:+.1f} points, gene-gene r {like.correlation:.2f}{depth}"
                )
        for question, holds, evidence in part.verdicts:
            print(f"  {'✓' if holds else '✗'} {question}: {evidence}")
    for note in report.notes:
        print(f"· {note}")


def demo(*, out: Path = Path("demo"), set_: SetOption = None) -> None:
    """Train STATE on 600 real H1 cells of the challenge, generate, assemble, check, pack, unpack, and report.

    Ends with a table: for each target the predicted cells, what is left of the target gene's expression, and how the
    predicted effect agrees with cells that training has not seen. At this depth only TMSB4X and MED12 have effects
    that repeat from one half of their cells to the other; the other three correlate with nothing but noise.

    Example: `pertcast demo --out demo`

    Parameters
    ----------
    out
        The folder for everything.
    """
    from pertcast.cli.console import Console, stdout_table
    from pertcast.demo import HEADER, run_demo
    from pertcast.errors import SubmissionError

    result = run_demo(out, overrides=set_ or (), progress=Console())
    print_report(result.outcome.report)
    stdout_table("Predicted cells beside held-out cells", HEADER, [row.cells() for row in result.rows])
    if not result.identical:
        raise SubmissionError(f"{result.unpacked}: unpacking did not give the prediction back; please report this")
    print(f"unpacked again, value for value: {result.unpacked}")
    print(f"the report, a page that opens offline: {result.report}")
    print(result.outcome.archive)


def export(run: Path, /, *, out: Path) -> None:
    """Write a run as a folder that `state tx infer` reads.

    Example: `pertcast export run --out state_run`

    Parameters
    ----------
    run
        The folder that `pertcast train` or `pertcast import` wrote.
    out
        The folder to write; it must not be there yet.
    """
    from pertcast.arc.import_export import export_run
    from pertcast.cli.console import Console

    print(export_run(run, out, progress=Console()))


def generate(
    run: Path,
    /,
    *,
    out: Path,
    targets: TargetsOption = None,
    store: Path | None = None,
    devices: DevicesOption = None,
    set_: SetOption = None,
) -> None:
    """Generate the requested number of cells for each target, one part file for each.

    The plan (how many cells each target gets under the season's cap) is shown first. A part that is already there and
    right is not made again. With several devices the targets are shared out over them; the files are the same.

    Example: `pertcast generate run --targets pert_counts_Validation.csv --out parts`

    Four GPUs: `pertcast generate run --targets pert_counts_Validation.csv --out parts --devices 4`

    Parameters
    ----------
    run
        The folder that `pertcast train` wrote.
    out
        The folder of the parts.
    store
        The store, if it has moved since training; a run that was imported needs one.
    """
    from pertcast.cli.console import console, say
    from pertcast.generate import generate as make

    overrides = list(set_ or ())
    if targets is not None:
        overrides.append(f"submission.targets={str(targets.absolute())!r}")
    say(make(run, out, store_path=store, overrides=overrides, devices=devices or 1, progress=console()))


def import_run(
    folder: Path,
    /,
    *,
    out: Path,
    checkpoint: Path | None = None,
    genes: Path | None = None,
    hvgs: Path | None = None,
    target_sum: float | None = None,
) -> None:
    """Import a folder that `state tx train` wrote, without running any code in it.

    `pertcast generate RUN --store STORE` then predicts with it, from the control cells of a store that `pertcast
    prepare` made of your cells. What of its options is not supported is an error that names the option.

    Example: `pertcast import state_run --out run`

    Parameters
    ----------
    folder
        The folder: config.yaml, var_dims.pkl, pert_onehot_map.pt, checkpoints/ and the rest.
    out
        The folder of the run.
    checkpoint
        Which checkpoint; default: checkpoints/final.ckpt in the folder.
    genes
        Names of all genes, one a line, in the order of training; asked for where the folder does not name them.
    hvgs
        The same of the highly variable genes.
    target_sum
        The total that its training cells were normalised to before log1p, such as 10000. `pertcast generate` then
        normalises the control cells to it.
    """
    from pertcast.arc.import_export import import_run as convert
    from pertcast.cli.console import Console

    print(
        convert(folder, out, checkpoint=checkpoint, genes=genes, hvgs=hvgs, target_sum=target_sum, progress=Console())
    )


def pack(
    file: Path,
    /,
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    season: SeasonOption = "vcc2025",
    genes: GenesOption,
    targets: TargetsOption = None,
    set_: RulesOption = None,
    force: ForceOption = False,
    level: int = 3,
    cross_check: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Check a prediction and pack it as the season's archive. An invalid prediction is not packed.

    The archive is read back and compared before it takes its name.

    Example: `pertcast pack prediction.h5ad --season vcc2025 --genes gene_names.csv -o prediction.vcc`

    Parameters
    ----------
    file
        The prediction, an h5ad file.
    out
        The archive, a .vcc file.
    level
        How hard zstd tries, 1 to 19: 3 is what the official packers use, 1 is faster and larger.
    cross_check
        Have the season's official packer pack the same file, where it is installed, and compare what both packed.
    """
    from pertcast.cli.console import Console
    from pertcast.submission.check.check import resolve_season
    from pertcast.submission.official_packer import cross_check as compare
    from pertcast.submission.official_packer import find_packer
    from pertcast.submission.pack import PackOptions
    from pertcast.submission.pack import pack as write

    rules, console = parse_rules(set_), Console()
    in_force = resolve_season(season, rules)
    if cross_check:
        find_packer(in_force)
    archive = write(
        file,
        out,
        season=in_force,
        genes=genes,
        targets=targets,
        progress=console,
        options=PackOptions(force=force, level=level),
    )
    if cross_check:
        found = compare(file, archive, season=in_force, genes=genes, targets=targets, progress=console)
        equal = "the same values" if not found.largest_difference else f"values within {found.largest_difference:.1e}"
        print(f"cross-checked: `{found.packer}` packs {equal} for {found.num_cells:,} x {found.num_genes:,}")
    print(archive)


def prepare(experiment: Path, /, *, out: Path, set_: SetOption = None) -> None:
    """Read the h5ad files of an experiment into a training store.

    The store is a folder of arrays that are read cell by cell: counts or log1p values, obs codes, the split, highly
    variable genes.
    It is written whole or not at all, and left as it is when it is already what the experiment asks for.

    Example: `pertcast prepare experiment.toml --out store`

    Parameters
    ----------
    experiment
        The experiment file, a superset of cell-load's starter.toml.
    out
        The folder of the store.
    """
    from pertcast.cli.console import Console
    from pertcast.config import load_experiment
    from pertcast.data.prepare import prepare as build

    print(build(load_experiment(experiment, set_ or (), command="prepare"), out, progress=Console()))


def run(
    experiment: Path,
    /,
    *,
    out: Path | None = None,
    rung: RungOption = None,
    model: ModelOption = None,
    set_: SetOption = None,
) -> None:
    """Run every stage of an experiment: prepare, train, generate, assemble, check, pack.

    A stage whose result is up to date is skipped; an interrupted one goes on where it stopped.

    Example: `pertcast run experiment.toml --out out --set train.steps=2000`

    Parameters
    ----------
    experiment
        The experiment file.
    out
        The folder for everything; default: a folder named as the experiment file, in the working folder.
    """
    from pertcast.cli.console import Console
    from pertcast.config import model_overrides, rung_overrides
    from pertcast.pipeline import run_experiment

    outcome = run_experiment(
        experiment,
        out or Path(experiment.stem),
        overrides=(*rung_overrides(rung), *model_overrides(model), *(set_ or ())),
        progress=Console(),
    )
    print_report(outcome.report)
    print(outcome.archive)


def sample(
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    season: SeasonOption = "vcc2025",
    genes: GenesOption,
    targets: Annotated[Path, Parameter(name="--targets", help="The season's target list, pert_counts.csv.")],
    set_: RulesOption = None,
    force: ForceOption = False,
    seed: int = 0,
    counts_per_cell: int = 500,
) -> None:
    """Write a valid submission of random cells, to test the upload. It scores like noise.

    Example: `pertcast sample --season vcc2026 --genes gene_names.csv --targets pert_counts.csv -o try.vcc`

    Parameters
    ----------
    out
        The archive, a .vcc file.
    seed
        Equal seeds give equal cells.
    counts_per_cell
        Mean of a cell's sum of counts, which decides how large the archive is.
    """
    from pertcast.cli.console import Console
    from pertcast.seasons import season as season_of
    from pertcast.submission.random_sample import RandomCells
    from pertcast.submission.random_sample import sample as write

    rules, cells = season_of(season, parse_rules(set_)), RandomCells(seed, counts_per_cell)
    print(write(out, season=rules, genes=genes, targets=targets, cells=cells, force=force, progress=Console()))


def unpack(file: Path, /, *, out: Annotated[Path, Parameter(name=["--out", "-o"])], force: ForceOption = False) -> None:
    """Extract the h5ad from an archive.

    Example: `pertcast unpack prediction.vcc -o prediction.h5ad`

    Parameters
    ----------
    file
        The archive, a .vcc file.
    out
        The h5ad file to write.
    """
    from pertcast.cli.console import Console
    from pertcast.submission.pack import unpack as take_out

    print(take_out(file, out, force=force, progress=Console()))


def verify(artefact: Path, /) -> None:
    """Check that an artefact (store, run, parts, prediction, archive) is complete and matches its manifest.

    Example: `pertcast verify run`

    Parameters
    ----------
    artefact
        A folder or file that pertcast wrote.
    """
    from pertcast.errors import CheckpointError
    from pertcast.files.artefacts import read_manifest, verify_artefact

    problems = verify_artefact(artefact)
    if problems:
        raise CheckpointError(f"{artefact}: not what its manifest says", problems=problems)
    manifest = read_manifest(artefact)
    print(f"{artefact}: a {manifest.kind}, whole ({len(manifest.files)} file(s))")


def train(
    experiment: Path,
    /,
    *,
    out: Path,
    store: Path | None = None,
    rung: RungOption = None,
    model: ModelOption = None,
    devices: DevicesOption = None,
    num_nodes: NodesOption = None,
    set_: SetOption = None,
) -> None:
    """Train a model on a store. Run the same command again to resume.

    The run is a folder: weights.safetensors, run.json, metrics.jsonl and the newest checkpoints.

    The sets of a step are shared out over the devices, so losses are the same on any number of them, but for rounding.

    Example: `pertcast train experiment.toml --out run --set train.steps=2000`

    Four GPUs: `pertcast train experiment.toml --store store --out run --devices 4`

    Two machines: `torchrun --nnodes 2 --nproc-per-node 4 -m pertcast train experiment.toml --store store --out run`

    Parameters
    ----------
    experiment
        The experiment file that the store was prepared from.
    out
        The folder of the run.
    store
        The folder that `pertcast prepare` wrote; default: the folder `store` beside the run, prepared if need be.
    """
    from pertcast.cli.console import console, say
    from pertcast.config import load_experiment, model_overrides, rung_overrides
    from pertcast.data.prepare import prepare
    from pertcast.data.store import Store
    from pertcast.errors import ConfigError
    from pertcast.preflight import preflight
    from pertcast.processes import launched

    asked = {"train.devices": devices, "train.num_nodes": num_nodes}
    options = [f"{key}={value}" for key, value in asked.items() if value is not None]
    overrides = (*rung_overrides(rung), *model_overrides(model), *options, *(set_ or ()))
    resolved, progress = load_experiment(experiment, overrides, command="train"), console()
    if store is None:
        if launched() is not None:
            raise ConfigError("under torchrun or srun the store must exist: run `pertcast prepare`, and give --store")
        preflight(resolved, out=out.parent, progress=progress)
        store = prepare(resolved, out.parent / "store", progress=progress)
    else:
        preflight(resolved, store=Store.open(store), progress=progress)
    from pertcast.train import train as fit

    say(fit(resolved, store, out, progress=progress))
