"""The rules of CONTRIBUTING.md that a program can check and no linter does."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(ROOT.glob("src/**/*.py"))
MAX_LINES = 300

#: Names for noise levels whose direction differs between papers.
AMBIGUOUS = {"t", "tau"}


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def names(tree: ast.AST) -> set[str]:
    """Variables, parameters and keywords in a syntax tree; not methods such as torch's transposition ``.t()``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.arg) or (isinstance(node, ast.keyword) and node.arg):
            found.add(node.arg)
    return found


def test_files_are_short() -> None:
    files = [*SOURCES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    lengths = {relative(file): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert {file: length for file, length in lengths.items() if length > MAX_LINES} == {}


@pytest.mark.parametrize("file", SOURCES, ids=relative)
def test_noise_levels_have_unambiguous_names(file: Path) -> None:
    assert not names(ast.parse(file.read_text(encoding="utf-8"))) & AMBIGUOUS


def test_the_table_of_layers_is_that_of_the_linter() -> None:
    """In the same order: the table from the lowest layer, the linter's list from the highest."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    checked = [
        name.removeprefix("fewstep.")
        for line in reversed(settings["contracts"][0]["layers"])
        for name in reversed(re.findall(r"[\w.]+", line))
    ]
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("| layer |")[2]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = [name.rstrip("/") for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    assert sorted(named) == sorted(checked)
    places = {name: index for index, cell in enumerate(cells) for name in re.findall(r"`([\w]+)/?`", cell)}
    assert [places[name] for name in checked] == sorted(places.values())


def test_every_module_is_in_a_layer() -> None:
    """A module beside the packages that no layer names would be checked by nothing."""
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    top = {path.stem for path in ROOT.glob("src/fewstep/*") if path.suffix == ".py" or (path / "__init__.py").exists()}
    unnamed = {name for name in top if f"`{name}`" not in table and f"`{name}/`" not in table}
    assert unnamed == {"__init__", "__main__"}
