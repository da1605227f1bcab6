"""Every benchmark imports what there is."""

import importlib
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SCRIPTS = sorted((TESTS.parent / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_benchmark_can_be_imported(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(script.parent)
    importlib.import_module(script.stem)


def test_benchmarks_and_test_helpers_have_different_names() -> None:
    """Both folders are on the import path of a test run: of two modules with one name, the first one imported wins."""
    assert not {script.stem for script in SCRIPTS} & {module.stem for module in TESTS.glob("*.py")}
