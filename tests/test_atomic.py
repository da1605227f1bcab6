"""Files and folders are complete or absent, whatever interrupts the write."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.atomic import atomic_file, atomic_folder, is_partial, partial_path, write_tensors, write_text
from fewstep.errors import UserError


def test_text_and_tensors_are_written_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "note.txt", "ünï")
    write_tensors(tmp_path / "w.safetensors", {"w": torch.eye(2, 3).T}, {"made": "here"})
    assert (tmp_path / "new" / "note.txt").read_text(encoding="utf-8") == "ünï"
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], torch.eye(3, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "w.safetensors"]


def test_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / "w.safetensors", {"w": torch.eye(2)})
    with atomic_folder(tmp_path / "model") as aside:
        save_file({"w": torch.eye(2)}, aside / "w.safetensors")
    modes = {path.name: path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == dict.fromkeys(["plain", "w.safetensors"], (tmp_path / "plain").stat().st_mode)
    assert (tmp_path / "model" / "w.safetensors").stat().st_mode == modes["plain"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_write_leaves_the_earlier_file(tmp_path: Path, error: type[BaseException]) -> None:
    file = tmp_path / "note.txt"
    file.write_text("before")

    def write_half() -> None:
        with atomic_file(file) as aside:
            aside.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_interrupted_write_leaves_the_earlier_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with atomic_folder(folder) as aside:
        (aside / "a").write_text("1")

    def write_half() -> None:
        with atomic_folder(folder) as aside:
            (aside / "b").write_text("2")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert [path.name for path in folder.iterdir()] == ["a"]
    assert list(tmp_path.iterdir()) == [folder]


def test_folder_replaces_the_earlier_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    partial_path(folder).mkdir()  # left by a process that was killed
    (partial_path(folder) / "torn").write_text("")
    for name in ("a", "b"):
        with atomic_folder(folder) as aside:
            (aside / "part").mkdir()
            (aside / "part" / name).write_text("")
    assert [str(path.relative_to(folder)) for path in folder.rglob("*")] == ["part", "part/b"]
    assert list(tmp_path.iterdir()) == [folder]


def test_write_error_is_one_line_that_says_nothing_was_lost(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (
        lambda path: write_text(path, "x"),
        lambda path: write_tensors(path, {"w": torch.zeros(1)}),
        lambda path: atomic_folder(path).__enter__(),
    ):
        with pytest.raises(UserError, match=r"cannot be written .*; nothing was lost") as refused:
            write(tmp_path / "file" / "below")
        assert "\n" not in str(refused.value)


def test_partial_names_are_recognized() -> None:
    assert is_partial(partial_path(Path("runs") / "recipe.yaml"))
    assert not is_partial(Path("recipe.yaml"))


def test_written_files_are_synced_before_they_are_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that reaches the disk before the contents leaves an empty file after a power cut."""
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        events.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_text(tmp_path / "note.txt", "x")
    assert events == ["sync .note.txt.partial", "rename", f"sync {tmp_path.name}"]
