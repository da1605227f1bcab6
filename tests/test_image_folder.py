"""Images are on disk as they are made; a run continues where it stopped and mixes with no other."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from test_machine import assert_one_line, files, run
from torch import Tensor

from fewstep.inference.image_folder import MANIFEST, ImageFolder
from fewstep.models.pipeline import TextToImagePipeline

PROMPTS = [f"fox {number}" for number in range(6)]


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Ctrl-C when the fourth image is to be written."""
    write = ImageFolder.write

    def interrupted_write(images: ImageFolder, index: int, image: Tensor, *text: str) -> None:
        if index == 3:
            raise KeyboardInterrupt
        write(images, index, image, *text)

    monkeypatch.setattr(ImageFolder, "write", interrupted_write)
    return monkeypatch


def generate(folder: Path, out: object, *more: object):
    return run("generate", folder, *PROMPTS, "--steps", 1, "--batch-size", 2, "--seed", 7, "-o", out, *more)


def pixels(folder: Path) -> list[bytes]:
    return [Image.open(file).tobytes() for file in sorted(folder.glob("*.png"))]


def test_interrupted_folder_is_continued(tiny_folder: Path, tmp_path: Path, interrupted: pytest.MonkeyPatch) -> None:
    stopped = generate(tiny_folder, tmp_path / "out")
    assert stopped.exit_code == 130
    assert f"interrupted; 3 of 6 images are in {tmp_path / 'out'}; the same command makes the others" in stopped.stderr
    assert files(tmp_path / "out") == ["0000.png", "0001.png", "0002.png", MANIFEST]
    interrupted.undo()
    kept = [(tmp_path / "out" / f"000{index}.png").stat().st_mtime_ns for index in range(3)]
    again = generate(tiny_folder, tmp_path / "out")
    assert again.exit_code == 0, again.output
    assert "6 images, NFE 2, " in again.stdout
    assert "3 of them were made earlier" in again.stdout
    assert kept == [(tmp_path / "out" / f"000{index}.png").stat().st_mtime_ns for index in range(3)]
    assert generate(tiny_folder, tmp_path / "whole").exit_code == 0
    assert pixels(tmp_path / "out") == pixels(tmp_path / "whole")


def test_interrupted_grid_is_continued(tiny_folder: Path, tmp_path: Path, interrupted: pytest.MonkeyPatch) -> None:
    stopped = generate(tiny_folder, tmp_path / "grid.png")
    assert stopped.exit_code == 130
    assert "3 of 6 images are in" in stopped.stderr
    assert not (tmp_path / "grid.png").exists()
    interrupted.undo()
    again = generate(tiny_folder, tmp_path / "grid.png")
    assert "3 of them were made earlier" in again.stdout, again.output
    assert files(tmp_path) == ["grid.png"]  # the images beside it are gone
    assert generate(tiny_folder, tmp_path / "whole.png").exit_code == 0
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_finished_folder_needs_no_model(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert generate(tiny_folder, tmp_path / "out").exit_code == 0
    monkeypatch.setattr("fewstep.models.pipeline.load", None)
    again = generate(tiny_folder, tmp_path / "out")
    assert again.stdout == f"{tmp_path / 'out'}: 6 images; 6 of them were made earlier\n"


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        (["--seed", 8], "other seed"),
        (["--height", 32, "--guidance-scale", 0], "other guidance_scale, height"),
        (["another fox"], "other prompts"),
        (["--dtype", "bf16"], "other dtype"),
    ],
)
def test_images_of_another_generation_are_refused(
    tiny_folder: Path, tmp_path: Path, changed: list[object], names: str
) -> None:
    assert generate(tiny_folder, tmp_path / "out").exit_code == 0
    before = pixels(tmp_path / "out")
    refused = generate(tiny_folder, tmp_path / "out", *changed)
    assert_one_line(refused, f"{tmp_path / 'out'}: holds images of another generation ({names})", "--overwrite")
    assert pixels(tmp_path / "out") == before
    assert generate(tiny_folder, tmp_path / "out", "--batch-size", 3).exit_code == 0  # the batch changes no image


def test_another_model_is_refused_and_a_moved_one_is_not(tiny: TextToImagePipeline, tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    assert generate(tmp_path / "model", tmp_path / "out").exit_code == 0
    (tmp_path / "model").rename(tmp_path / "moved")
    assert generate(tmp_path / "moved", tmp_path / "out").exit_code == 0
    time.sleep(0.01)  # a file system's clock may tick slowly
    tiny.save(tmp_path / "moved")
    assert_one_line(generate(tmp_path / "moved", tmp_path / "out"), "another generation (other model files)")


def test_overwrite_deletes_the_images_and_nothing_else(tiny_folder: Path, tmp_path: Path) -> None:
    assert generate(tiny_folder, tmp_path / "out").exit_code == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    done = run("generate", tiny_folder, "a bear", "--steps", 1, "-o", tmp_path / "out", "--overwrite")
    assert done.exit_code == 0, done.output
    assert files(tmp_path / "out") == ["0000.png", MANIFEST, "notes.txt"]


def test_numbered_images_of_unknown_origin_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "0000.png").write_text("mine")
    assert_one_line(generate(tiny_folder, tmp_path), tmp_path / "0000.png", "is in the way", "use another --out")
    assert (tmp_path / "0000.png").read_text() == "mine"


def test_damaged_manifest_is_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{")
    assert_one_line(generate(tiny_folder, tmp_path), tmp_path / MANIFEST, "cannot be read", "use --overwrite")


def test_unfinished_images_of_another_grid_are_deleted_with_a_warning(
    tiny_folder: Path, tmp_path: Path, interrupted: pytest.MonkeyPatch
) -> None:
    assert generate(tiny_folder, tmp_path / "grid.png").exit_code == 130
    interrupted.undo()
    done = generate(tiny_folder, tmp_path / "grid.png", "--seed", 9)
    assert done.exit_code == 0, done.output
    assert "warning: unfinished images are deleted" in done.stderr
    again = generate(tiny_folder, tmp_path / "grid.png", "--seed", 9)
    assert again.stdout.endswith("; an earlier file was replaced\n")


@pytest.mark.slow
def test_killed_process_leaves_whole_images(tiny_folder: Path, tmp_path: Path) -> None:
    """SIGKILL cannot be caught: what is on disk then is all that counts."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"fox {number}\n" for number in range(400)))
    words = ["generate", tiny_folder, "--prompts-file", prompts, "--batch-size", 1, "-o", tmp_path / "out"]
    process = subprocess.Popen([sys.executable, "-m", "fewstep", *map(str, words)], stderr=subprocess.PIPE)
    while not (tmp_path / "out" / "0003.png").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    images = sorted((tmp_path / "out").glob("*.png"))
    assert 4 <= len(images) < 400
    for image in images:
        Image.open(image).load()
