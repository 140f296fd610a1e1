"""Read the season's target list and gene list.

Invariant: a list is accepted unchanged or refused with every problem at its line.
"""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pertcast.errors import DataError, Problem
from pertcast.files.labels import too_long
from pertcast.files.obs import wrong_kind
from pertcast.seasons import Season

_CELLS = "n_cells"
_UMI = "median_umi_per_cell"
_TARGET_ALIASES = ("gene", "target", "perturbation", "pert", "gene_name", "symbol", "target_gene_name")
_GENE_HEADERS = frozenset(
    {"gene_name", "gene_names", "gene", "genes", "gene_symbol", "symbol", "feature_name", "name", "index", "0"}
)
_NUM_SHOWN = 20


@dataclass(frozen=True)
class TargetList:
    """The target list of a submission, in the order of its file."""

    targets: tuple[str, ...]  # Labels of the targets, controls not among them
    # Cells asked for of each target (in each context), or ``None`` if neither list nor season says
    n_cells: tuple[int, ...] | None = None
    # Median UMI count of a real cell of each target, or ``None`` if the list has none
    median_umi: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()  # Sentences that the user should read

    def __len__(self) -> int:
        return len(self.targets)

    def __iter__(self) -> Iterator[str]:
        return iter(self.targets)

    def requested(self) -> dict[str, int]:
        """Return target → requested cells."""
        if self.n_cells is None:
            raise DataError(
                f"target list: it has no column {_CELLS!r}, and the season does not say how many cells a target has; "
                f"add the column, or pass --set cells_per_target=..."
            )
        return dict(zip(self.targets, self.n_cells, strict=True))


def _read_rows(path: Path, what: str) -> list[tuple[int, list[str]]]:
    """Return (line number, fields) of each line of a CSV file."""
    if what_it_is := wrong_kind(path):
        raise DataError(f"{path}: expected a {what} as a CSV text file; it is {what_it_is}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            # spreadsheets write semicolons or tabs in many countries
            delimiter = next((mark for mark in (",", ";", "\t") if mark in first), ",")
            stream.seek(0)
            reader = csv.reader(stream, strict=True, delimiter=delimiter)
            return [(reader.line_num, fields) for fields in reader]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the path of the {what}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: expected a {what} as a CSV text file ({error}); give the season's own file") from None


def _limited(problems: Sequence[Problem], path: Path) -> list[Problem]:
    """Return the first problems, and the number of further ones."""
    rest = len(problems) - _NUM_SHOWN
    more = [Problem(str(path), f"and {rest} more problems like these")] if rest > 0 else []
    return [*problems[:_NUM_SHOWN], *more]


def read_targets(path: Path, season: Season) -> TargetList:
    """Read a season's target list (``pert_counts*.csv``): ``target_gene``, and cells and UMI counts if given."""
    rows = [(line, fields) for line, fields in _read_rows(path, "target list") if fields]
    if not rows:
        raise DataError(f"{path}: expected a target list, got an empty file; give the season's pert_counts file")
    header = [name.strip() for name in rows[0][1]]
    if season.pert_column not in header:
        folded = {name.casefold(): name for name in header}
        near = difflib.get_close_matches(season.pert_column, list(folded), n=1) or [
            alias for alias in _TARGET_ALIASES if alias in folded
        ]
        remedy = f"rename {folded[near[0]]!r} to it" if near else "give the season's pert_counts file"
        raise DataError(
            f"{path}, line 1: expected a column {season.pert_column!r}, got {', '.join(map(repr, header))}; {remedy}"
        )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}, line 1: column {twice[0]!r} occurs twice; keep it once")
    return _parse_targets(path, season, header, rows[1:])


def _parse_targets(path: Path, season: Season, header: list[str], rows: list[tuple[int, list[str]]]) -> TargetList:
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    cells: list[int] = []
    umis: list[float] = []
    for line, fields in rows:
        place = f"{path}, line {line}"
        if len(fields) != len(header):
            problems.append(Problem(place, f"expected {len(header)} fields, got {len(fields)}", "correct the line"))
            continue
        row = dict(zip(header, fields, strict=True))
        problems += _label_problems(place, row[season.pert_column], seen, season)
        seen.setdefault(row[season.pert_column], line)
        if _CELLS in row:
            number = _whole_number(row[_CELLS])
            if number is None or number < 1:
                message = f"expected {_CELLS} as a whole number of at least 1, got {row[_CELLS]!r}"
                problems.append(Problem(place, message, "correct the number"))
            elif season.cells_per_target not in (None, number):
                message = f"expected {season.cells_per_target} cells for each target of the season, got {number}"
                problems.append(Problem(place, message, f"drop the column {_CELLS}, or correct the number"))
            cells.append(number or 0)
        if _UMI in row:
            umi = _positive_number(row[_UMI])
            if umi is None:
                message = f"expected {_UMI} as a number above 0, got {row[_UMI]!r}"
                problems.append(Problem(place, message, "correct the number"))
            umis.append(umi or 0.0)
    if not rows:
        problems.append(Problem(str(path), "it has a header and no target", "give the season's pert_counts file"))
    if problems:
        raise DataError(f"{path}: {len(problems)} problem(s) in the target list", problems=_limited(problems, path))
    n_cells = tuple(cells) or (season.cells_per_target and (season.cells_per_target,) * len(seen)) or None
    notes = []
    if len(seen) != season.num_targets:
        notes.append(f"targets in {path.name}: {len(seen)}; in the list of season {season.name}: {season.num_targets}")
    return TargetList(tuple(seen), n_cells, tuple(umis) or None, tuple(notes))


def _label_problems(place: str, label: str, seen: dict[str, int], season: Season) -> list[Problem]:
    if why := too_long(label):
        return [Problem(place, f"{label[:40]!r}...: {why}", "give the target a shorter label")]
    if not label.strip():
        return [Problem(place, f"{season.pert_column} is empty", "name the target, or remove the line")]
    if label != label.strip():
        return [Problem(place, f"{label!r} has spaces around it", f"write {label.strip()!r}")]
    if label == season.control_label:
        remedy = "remove the line; controls are planned apart from targets (submission.num_controls)"
        return [Problem(place, f"the control label {label!r} is not a target", remedy)]
    if label in seen:
        return [Problem(place, f"target {label!r} is on line {seen[label]} already", "keep it once")]
    return []


def _whole_number(text: str) -> int | None:
    number = _positive_number(text)
    return int(number) if number is not None and number.is_integer() else None


def _positive_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number > 0 else None


def read_gene_list(path: Path, season: Season) -> tuple[str, ...]:
    """Read the genes of a prediction in their order (``gene_names.csv``), one on each line.

    >>> import tempfile
    >>> from pertcast.seasons import season
    >>> path = Path(tempfile.mkdtemp()) / "genes.csv"
    >>> _ = path.write_text("TP53")
    >>> read_gene_list(path, season("vcc2025", {"num_genes": 1}))
    ('TP53',)
    """
    rows = _read_rows(path, "gene list")
    problems: list[Problem] = []
    first = rows[0][1][0] if rows and rows[0][1] else ""
    if season.genes_header is not None:
        if first == season.genes_header:
            rows = rows[1:]
        else:
            message = f"expected the header {season.genes_header!r} of season {season.name}, got {first!r}"
            problems.append(Problem(f"{path}, line 1", message, "give the season's own gene list, or add the header"))
    elif first.casefold() in _GENE_HEADERS:
        message = f"got {first!r}, a header; the gene list of season {season.name} has none"
        problems.append(Problem(f"{path}, line 1", message, "remove the line, or check that --season is right"))
        rows = rows[1:]
    seen: dict[str, int] = {}
    for line, fields in rows:
        place = f"{path}, line {line}"
        gene = fields[0] if fields else ""
        if len(fields) > 1:
            message = f"expected one gene a line, got {len(fields)} columns"
            problems.append(Problem(place, message, "leave the column of gene names alone"))
        elif not gene.strip():
            problems.append(Problem(place, "the line is empty", "remove it, or name the gene"))
        elif gene != gene.strip():
            problems.append(Problem(place, f"{gene!r} has spaces around it", f"write {gene.strip()!r}"))
        elif gene in seen:
            problems.append(Problem(place, f"gene {gene!r} is on line {seen[gene]} already", "keep it once"))
        seen.setdefault(gene, line)
    if len(rows) != season.num_genes:
        message = f"expected {season.num_genes:,} genes of season {season.name}, got {len(rows):,}"
        remedy = (
            "give the season's own list; for data that is not the challenge's override the rule: "
            f"num_genes={len(rows)} with --set, or in [submission.rules] of an experiment"
        )
        problems.append(Problem(str(path), message, remedy))
    if problems:
        # The count goes first: where it is wrong, the lines below are likely to be those of another file.
        problems.sort(key=lambda problem: problem.place != str(path))
        raise DataError(f"{path}: {len(problems)} problem(s) in the gene list", problems=_limited(problems, path))
    return tuple(seen)


def write_genes(path: Path, genes: Sequence[str]) -> None:
    """Write genes in their order, one on each line, quoted as CSV if needed."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([gene] for gene in genes)


def read_written_genes(path: Path) -> tuple[str, ...]:
    """Read what :func:`write_genes` wrote."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return tuple(row[0] for row in csv.reader(stream, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error, IndexError) as error:
        raise DataError(f"{path}: expected the genes that pertcast wrote ({error}); make it again") from None
