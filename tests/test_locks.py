"""One output has one writer: runs, shards, caches, conversions, images; and locks that leave nothing behind."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from test_machine import assert_one_line, files, run

from fewstep.atomic import atomic_folder, write_text
from fewstep.errors import UserError
from fewstep.locks import exclusive, lock

HOLD = "import sys; from fewstep.locks import lock; lock(sys.argv[1]); print('locked', flush=True); sys.stdin.read()"


@contextmanager
def locked_elsewhere(path: Path) -> Iterator[subprocess.Popen]:
    """Another process holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_second_process_is_refused_until_the_first_ends_however_it_ends(tmp_path: Path) -> None:
    file, folder = tmp_path / "a.safetensors", tmp_path / "folder"
    folder.mkdir()
    for path in (file, folder):
        with locked_elsewhere(path) as process:
            with pytest.raises(UserError, match=f"{path}: another process is using it; wait"):
                lock(path)
            with pytest.raises(UserError, match="another process is using it"):
                write_text(path if path == file else folder / "x", "") if path == file else lock(folder)
            process.kill()
            process.wait()
        lock(path)()  # a killed process leaves no stale lock
    assert files(tmp_path) == ["folder"]


def test_commands_refuse_an_output_that_another_process_writes(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\na bear\n")
    recipe = tmp_path / "cache.yaml"
    recipe.write_text(f"{{kind: cache_trajectories, name: cache, teacher: {tiny_folder}, num_trajectories: 4}}")
    commands = {
        "shards": ["encode-prompts", tmp_path / "prompts.txt", "--model", "nowhere", "--out", tmp_path / "shards"],
        "cache": ["cache-trajectories", recipe, "-s", "teacher=nowhere", "--out", tmp_path / "cache"],
        "model": ["convert", "nowhere", "--out", tmp_path / "model"],
        "a.safetensors": ["convert", "nowhere", "--to", "original", "--out", tmp_path / "a.safetensors"],
        "report": ["evaluate", "micro", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "report"],
        "images": ["generate", tiny_folder, "a fox", "--out", f"{tmp_path / 'images'}/"],
    }
    for name in ("shards", "cache", "report", "images"):
        (tmp_path / name).mkdir()
    for name, words in commands.items():  # the model is not even looked for
        with locked_elsewhere(tmp_path / name):
            assert_one_line(run(*words), tmp_path / name, "another process is using it")


def test_atomic_writes_of_two_processes_do_not_meet(tmp_path: Path) -> None:
    with locked_elsewhere(tmp_path / "model"), pytest.raises(UserError, match="another process is using it"):
        atomic_folder(tmp_path / "model").__enter__()
    with locked_elsewhere(tmp_path / "a.txt"), pytest.raises(UserError, match="another process is using it"):
        write_text(tmp_path / "a.txt", "")
    assert not (tmp_path / "a.txt").exists()


def test_a_process_that_has_the_folder_writes_into_it(tmp_path: Path) -> None:
    with exclusive(tmp_path), exclusive(tmp_path / "below"):
        write_text(tmp_path / "a.txt", "mine")
        assert files(tmp_path) == ["a.txt"]
    lock(tmp_path)()


def test_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "x"):
        raise ZeroDivisionError
    lock(tmp_path / "x")()
    assert files(tmp_path) == []


def test_a_replaced_folder_is_locked_anew(tmp_path: Path) -> None:
    """A lock on a folder that has been replaced meanwhile would protect nothing."""
    folder = tmp_path / "x"
    folder.mkdir()
    unlock = lock(folder)
    folder.rename(tmp_path / "old")
    folder.mkdir()
    with locked_elsewhere(folder), pytest.raises(UserError, match="another process"):
        lock(folder)
    unlock()


ASCII = {"PYTHONIOENCODING": "ascii"}
C_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.slow
def test_prompts_and_names_in_another_locale(tiny_folder: Path, tmp_path: Path) -> None:
    """The same images and names as in UTF-8, whatever the terminal can show."""
    environment = ASCII | C_LOCALE
    out = tmp_path / "狐狸"
    words = ["generate", str(tiny_folder), "一只狐狸", "--steps", "1", "--out", f"{out}/"]
    done = subprocess.run(
        [sys.executable, "-m", "fewstep", *words], env=os.environ | environment, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert b"1 images, NFE" in done.stdout
    assert run("generate", tiny_folder, "一只狐狸", "--steps", 1, "--out", tmp_path / "same.png").exit_code == 0
    with Image.open(out / "0000.png") as one, Image.open(tmp_path / "same.png") as other:
        assert one.tobytes() == other.tobytes()


def test_summary_on_a_terminal_without_its_characters() -> None:
    program = (
        "import sys, fewstep.cli.main as m; from rich.console import Console; "
        "m.app = lambda: Console().print('object accuracy ÷ 狐狸'); m.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | ASCII, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "object accuracy \\xf7 \\u72d0\\u72f8\n"), done.stderr
