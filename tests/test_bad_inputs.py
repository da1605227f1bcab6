"""Every bad input ends with one line that names what is wrong, and changes no file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import typer
from bad_inputs import CASES
from bad_inputs.page import page
from bad_inputs.table import Case, Message
from typer.testing import CliRunner

from fewstep.cli.main import app

ERRORS_PAGE = Path(__file__).parent.parent / "docs" / "reference" / "errors.md"


def contents(directory: Path) -> dict[str, bytes]:
    """Every readable file and every folder below a folder, by its relative path."""
    found = sorted(path for path in directory.rglob("*") if path.is_file() or path.is_dir())
    names = [path.relative_to(directory).as_posix() for path in found]
    return {name: path.read_bytes() if path.is_file() else b"" for name, path in zip(names, found, strict=True)}


def error_of(stderr: str, exit_code: int) -> str:
    """The one error in what a command printed: a line, or for wrong usage a box, mostly below the usage line."""
    remarks = ("warning: ", "device: ")
    lines = [line for line in stderr.splitlines() if line.strip() and not line.startswith(remarks)]
    if exit_code == 1:
        assert len(lines) == 1, stderr
        assert lines[0].startswith("error: "), stderr
        return lines[0].removeprefix("error: ")
    assert exit_code == 2, stderr
    boxed = [line.strip("│ ") for line in lines if line.startswith("│")]
    assert boxed, stderr
    return " ".join(boxed)


@pytest.mark.parametrize(("message", "case"), CASES, ids=[case.command[:80] for _, case in CASES])
def test_bad_input(
    message: Message, case: Case, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "tiny" in f"{case.command} {case.files}":
        shutil.copytree(tiny_folder, "tiny")
    for name, content in case.files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)
    before = contents(tmp_path)
    done = CliRunner().invoke(app, case.words, env={"COLUMNS": "500", "TERM": "dumb"})
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    found = error_of(done.stderr, done.exit_code)
    assert case.expected in found
    assert message.pattern.fullmatch(found), (message.text, found)
    after = contents(tmp_path)
    assert {name for name in before if before[name] != after.get(name)} == set()
    assert set(after) - set(before) == set()


def options() -> set[tuple[str, str]]:
    """(command, option) for every option of every command that takes a value."""
    program = typer.main.get_command(app)
    groups = [("", program), ("emoji ", program.commands["emoji"])]  # type: ignore[attr-defined]
    commands = [(prefix + name, command) for prefix, group in groups for name, command in group.commands.items()]
    return {
        (name, max(option.opts, key=len))
        for name, command in commands
        for option in command.params
        if option.param_type_name == "option" and not option.is_flag
    }


def test_every_option_has_a_bad_value() -> None:
    tried = set()
    for _, case in CASES:
        words = [{"-o": "--out", "-s": "--set"}.get(word, word.partition("=")[0]) for word in case.words]
        tried |= {(case.command_name, word) for word in words}
    assert options() - tried == set()


def test_no_input_is_listed_twice() -> None:
    listed = [(case.command, str(case.files)) for _, case in CASES]
    assert len(set(listed)) == len(listed) >= 200


def test_every_message_has_advice() -> None:
    messages = {message.text: message.advice for message, _ in CASES}
    assert [text for text, advice in messages.items() if not advice.endswith(".")] == []


def test_the_page_of_errors_is_current() -> None:
    """``make docs`` writes it from the table."""
    assert ERRORS_PAGE.read_text(encoding="utf-8") == page()
