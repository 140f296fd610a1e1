"""The season's lists are read whole or refused with every problem at its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from pertcast.errors import DataError
from pertcast.files.season_lists import read_gene_list, read_targets
from pertcast.seasons import Season, season

RULES = season("vcc2025", {"num_genes": 3, "num_targets": 2})


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "list.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_real_lists(shared_data: Path) -> None:
    rules = season("vcc2025")
    genes = read_gene_list(shared_data / "vcc2025" / "gene_names.csv", rules)
    assert (len(genes), genes[0], genes[-1]) == (18_080, "SAMD11", "MT-CYB")
    targets = read_targets(shared_data / "vcc2025" / "pert_counts_Validation.csv", rules)
    assert len(targets) == 50
    assert sum(targets.requested().values()) == 60_751
    assert targets.targets[0] == "SH3BP4"
    assert targets.median_umi is not None
    assert targets.median_umi[0] == 54551.0
    assert targets.notes == ()


def test_the_season_fills_in_cells(shared_data: Path) -> None:
    targets = read_targets(shared_data / "vcc2026" / "pert_counts.csv", season("vcc2026"))
    assert len(targets) == 300
    assert set(targets.requested().values()) == {400}
    assert targets.median_umi is None


def test_cells_that_nobody_gives(tmp_path: Path) -> None:
    targets = read_targets(write(tmp_path, "target_gene\nTP53\nMYC\n"), RULES)
    assert list(targets) == ["TP53", "MYC"]
    with pytest.raises(DataError, match="no column 'n_cells'"):
        targets.requested()


def test_order_whole_floats_and_foreign_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeffn_cells,target_gene,other\r\n10.0,Z,x\r\n3,A,y\r\n\r\n")
    assert read_targets(path, RULES).requested() == {"Z": 10, "A": 3}


def test_another_number_of_targets_is_a_note(tmp_path: Path) -> None:
    (note,) = read_targets(write(tmp_path, "target_gene\nTP53\n"), RULES).notes
    assert note == "targets in list.csv: 1; in the list of season vcc2025: 2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty file"),
        ("target_gene,n_cells\n", "no target"),
        ("gene,n_cells\nTP53,3\n", r"line 1: expected a column 'target_gene'.*rename 'gene'"),
        ("Target_Gene,n_cells\nTP53,3\n", "rename 'Target_Gene'"),
        ("foo,n_cells\nTP53,3\n", "pert_counts file"),
        ("target_gene,n_cells,n_cells\nTP53,3,4\n", "occurs twice"),
        ("target_gene,n_cells\nTP53,3\nTP53,4\n", "line 3: target 'TP53' is on line 2 already"),
        ("target_gene,n_cells\nTP53,0\n", "line 2: expected n_cells as a whole number of at least 1, got '0'"),
        ("target_gene,n_cells\nTP53,2.5\n", "got '2.5'"),
        ("target_gene,n_cells\nTP53,many\n", "got 'many'"),
        ("target_gene,n_cells\nTP53,nan\n", "got 'nan'"),
        ("target_gene,n_cells\nTP53,-4\n", "got '-4'"),
        ("target_gene,n_cells\nTP53\n", "line 2: expected 2 fields, got 1"),
        ("target_gene,n_cells\nnon-targeting,5\n", "control label 'non-targeting' is not a target"),
        ("target_gene,n_cells\n,5\n", "line 2: target_gene is empty"),
        ("target_gene,n_cells\n TP53,5\n", "spaces around it"),
        ("target_gene,n_cells,median_umi_per_cell\nTP53,5,x\n", "median_umi_per_cell as a number above 0, got 'x'"),
        (b"target_gene\n\xff\xfe\n", "CSV text file"),
        ('target_gene\n"TP53\n', "CSV text file"),
    ],
)
def test_wrong_target_lists(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_targets(write(tmp_path, text), RULES)


def test_all_problems_of_a_target_list_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "target_gene,n_cells\nTP53,0\nTP53,4\nnon-targeting,5\nMYC,x\n")
    with pytest.raises(DataError) as caught:
        read_targets(path, RULES)
    assert [problem.place.rpartition(" ")[2] for problem in caught.value.problems] == ["2", "3", "4", "5"]
    assert all(problem.remedy for problem in caught.value.problems)


def test_cells_other_than_the_season_has(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected 400 cells for each target of the season, got 3"):
        read_targets(write(tmp_path, "target_gene,n_cells\nTP53,3\n"), season("vcc2026"))


@pytest.mark.parametrize("reader", [read_targets, read_gene_list])
def test_missing_files_and_folders(tmp_path: Path, reader: object) -> None:
    for path, message in ((tmp_path / "nowhere.csv", "no such file"), (tmp_path, "CSV text file")):
        with pytest.raises(DataError, match=message):
            reader(path, RULES)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A\nB\n", r"expected 3 genes of season vcc2025, got 2.*num_genes=2 with --set"),
        ("", "got 0"),
        ("A\nB\nC\nD\n", "got 4"),
        ("gene_name\nA\nB\nC\n", "line 1: got 'gene_name', a header; the gene list of season vcc2025 has none"),
        ("A\nB\nA\n", "line 3: gene 'A' is on line 1 already"),
        ("A\n\nB\n", "line 2: the line is empty"),
        ("A\nB \nC\n", "spaces around it"),
        ("A,1\nB,2\nC,3\n", "expected one gene a line, got 2 columns"),
        (b"A\nB\n\xff\n", "CSV text file"),
    ],
)
def test_wrong_gene_lists(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_gene_list(write(tmp_path, text), RULES)


def test_a_header_where_the_season_has_one(tmp_path: Path) -> None:
    rules: Season = season("vcc2026", {"num_genes": 2})
    assert read_gene_list(write(tmp_path, "gene_name\nB\nA\n"), rules) == ("B", "A")
    with pytest.raises(DataError, match="expected the header 'gene_name' of season vcc2026, got 'B'"):
        read_gene_list(write(tmp_path, "B\nA\n"), rules)


def test_a_list_of_another_season_shows_few_of_its_problems(tmp_path: Path) -> None:
    text = "".join(f"G{number},x\n" for number in range(500))
    with pytest.raises(DataError) as caught:
        read_gene_list(write(tmp_path, text), RULES)
    assert len(caught.value.problems) == 21
    assert "got 500" in caught.value.problems[0].message
    assert "481 more problems" in caught.value.problems[-1].message
