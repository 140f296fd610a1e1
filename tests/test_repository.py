"""What the repository promises of itself: docstrings, sizes, exports, commands in the README, recipes that load."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pertcast import _HOMES, __version__
from pertcast.cli.app import COMMANDS
from pertcast.config import load_experiment

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "pertcast"
SOURCES = sorted(PACKAGE.rglob("*.py"))
READMES = ("README.md", "README.zh-CN.md")
OFFICIAL_FILES = ("adata_Training.h5ad", "ESM2_pert_features.pt", "gene_names.csv", "pert_counts_Validation.csv")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_says_what_it_does_and_is_one_idea(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, "no module docstring"
    assert docstring.splitlines()[0].endswith((".", ":")) or "\n" in docstring
    assert len(text.splitlines()) <= 500


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "__main__.py"], ids=name_of)
def test_exports_are_sorted_and_there(path: Path) -> None:
    if path.name == "gather_kernel.py":
        pytest.importorskip("triton", reason="Triton comes with torch for GPUs")
    module = importlib.import_module(module_name(path))
    exported = getattr(module, "__all__", ())
    assert list(exported) == sorted(exported, key=lambda name: (not name.isupper(), not name[:1].isupper(), name))
    for name in exported:
        assert hasattr(module, name)


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if "cli" not in path.relative_to(PACKAGE).parts], ids=name_of
)
def test_nothing_prints_outside_the_command_line(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


@pytest.mark.parametrize("readme", READMES)
def test_the_readme_names_every_command_and_no_other(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    named = set(re.findall(r"pertcast ([a-z]+)\b", "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.S))))
    assert named == set(COMMANDS)


def tree_of(name: str) -> set[str]:
    """Return the paths that the tree in a Markdown file lists."""
    text = (ROOT / name).read_text(encoding="utf-8")
    tree = next(block for block in re.findall(r"```.*?```", text, flags=re.S) if "src/pertcast/" in block)
    folders: list[str] = []
    paths = set()
    for line in tree.splitlines()[1:-1]:
        match = re.match(r"( *)(\S+)", line)
        if not match or not re.search(r"\.\w+$|/$|^Makefile$|^LICENSE$", match[2]):
            continue
        depth = len(match[1]) // 2
        folders[depth:] = [match[2]]
        paths.add("".join(folders[:depth]) + match[2])
    return paths


@pytest.mark.parametrize("name", [*READMES, "CONTRIBUTING.md"])
def test_paths_in_a_tree_are_there(name: str) -> None:
    paths = tree_of(name)
    assert len(paths) > 20
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "__init__.py"], ids=name_of)
def test_the_tree_in_contributing_lists_every_source_file(path: Path) -> None:
    assert name_of(path) in tree_of("CONTRIBUTING.md")


def test_every_file_that_contributing_names_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = [name for name in re.findall(r"`([\w/]+(?:\.py|/))`", text) if name != "src/pertcast/"]
    rows = re.findall(r"^\| [^|]+ \| `", text, flags=re.M)
    assert len(rows) >= 20
    assert len(named) > 60
    assert [name for name in named if not ((PACKAGE / name).exists() or (ROOT / name).exists())] == []


EXPORTED = {home.partition(":")[2] for home in _HOMES.values()}
SECTIONS = re.compile(r"^ *(Parameters|Returns|Yields|Raises|Attributes|Examples|References|Notes)\n *-+$", flags=re.M)


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if path.parts[-2:] not in (("cli", "pipeline.py"), ("cli", "ladder.py"))],
    ids=name_of,
)
def test_internal_names_have_no_numpy_sections(path: Path) -> None:
    def with_sections(node: ast.AST, *, exported: bool) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                public = (exported or child.name in EXPORTED) and not child.name.startswith("_")
                if not public and SECTIONS.search(ast.get_docstring(child, clean=False) or ""):
                    yield child.name
                yield from with_sections(child, exported=public)

    assert list(with_sections(ast.parse(path.read_text(encoding="utf-8")), exported=False)) == []


def test_a_function_has_at_most_seven_arguments() -> None:
    """Commands of the command line and compiled kernels aside."""
    long = []
    for path in SOURCES:
        if path.parent.name == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            kernels = {"compiled", "triton.jit"}
            if isinstance(node, ast.FunctionDef) and kernels.isdisjoint(map(ast.unparse, node.decorator_list)):
                names = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
                if len(set(names) - {"self", "cls"}) > 7:
                    long.append(f"{name_of(path)}: {node.name}")
    assert long == []


def test_every_make_target_of_the_readme_is_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    for name in (*READMES, "CONTRIBUTING.md"):
        assert set(re.findall(r"\bmake ([a-z]+)\b", (ROOT / name).read_text(encoding="utf-8"))) <= targets


def test_versions_agree() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"]


def test_every_constraint_is_one_version() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins)
    names = [pin.partition("==")[0].lower().replace("_", "-") for pin in pins]
    assert len(set(names)) == len(names)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = re.findall(r'^  "([A-Za-z0-9-]+)(?:[>=].*)?",$', project, flags=re.M)
    assert {name.lower() for name in wanted} <= set(names)


def test_the_season_2025_recipe_loads_with_the_official_file_names(tmp_path: Path) -> None:
    recipe = tmp_path / "vcc2025.toml"
    recipe.write_text((ROOT / "recipes" / "vcc2025.toml").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "data").mkdir()
    for name in OFFICIAL_FILES:
        (tmp_path / "data" / name).touch()
    experiment = load_experiment(recipe)
    assert experiment.submission.resolve().overridden == ()
    assert experiment.features.path == tmp_path / "data" / "ESM2_pert_features.pt"
    assert experiment.datasets == {"h1": str(tmp_path / "data" / "adata_Training.h5ad")}


@pytest.mark.parametrize("name", ["h1_vcc2025.h5ad", "Arc Research Institute", "MIT License", "cell-eval2 0.20.0"])
def test_the_notice_says_where_the_shipped_cells_are_from(name: str) -> None:
    assert name in (PACKAGE / "assets" / "NOTICE.md").read_text(encoding="utf-8")
