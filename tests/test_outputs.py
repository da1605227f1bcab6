"""What cannot be written is found before any model is loaded."""

import os
from importlib import import_module
from pathlib import Path

import pytest
from limits import UNWRITABLE, file_size_limit
from PIL import Image
from test_machine import assert_one_line, files, run
from tiny import tiny_recipe

from fewstep.emoji.commands import TRAINERS
from fewstep.errors import UserError
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.outputs import check_file, check_folder, check_image, names_folder, write_image
from fewstep.training.run_dir import RunDir


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model, or a part of one, is a failure."""

    def load(*words: object, **more: object) -> None:
        raise AssertionError("a model was loaded")

    for trainer in TRAINERS.values():
        import_module(trainer)  # a module that is first imported below would keep the function of the test
    for module in ("fewstep.api", "fewstep.data.teacher_trajectories", "fewstep.emoji.publish", "fewstep.jobs"):
        monkeypatch.setattr(f"{module}.load", load)
    for name in ("pipeline.load", "partial_models.load_prompt_encoder", "partial_models.with_components_from"):
        monkeypatch.setattr(f"fewstep.models.{name}", load)
    monkeypatch.setattr("fewstep.models.components.load_component", load)


@pytest.fixture
def inputs(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Inputs of all commands, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("".join(f"a fox {number}\n" for number in range(252)))
    Path("recipe.yaml").write_text(
        f"{{kind: distill, name: tiny, teacher: {tiny_folder}, "
        "optim: {student: {lr: 0.01}, fake_score: {lr: 0.02}}, "
        "method: {name: dmd, terms: {cfg_augmentation: {}, distribution_matching: {}}}, "
        "train: {steps: 1, batch_size: 1}, prompts: {source: prompts.txt}, evaluate: {enabled: false}}"
    )
    Path("cache.yaml").write_text(
        f"{{kind: cache_trajectories, name: c, teacher: {tiny_folder}, num_trajectories: 4, "
        "prompts: {source: prompts.txt}}"
    )
    Path("taken").write_text("a file")
    Path("folder").mkdir()
    Path("folder/notes.txt").write_text("mine")
    Path("finished").mkdir()
    Path("finished/index.json").write_text("{}")
    Path("report").mkdir()
    Path("report/index.html").mkdir()
    return tmp_path


GRID = ["generate", "MODEL", "--prompts-file", "prompts.txt", "--columns", "1", "-o"]
FOLDER = ["generate", "MODEL", "--prompts-file", "prompts.txt", "-o"]
ENCODE = ["encode-prompts", "prompts.txt", "--model", "MODEL", "--out"]
SOURCE = ["encode-prompts", "--model", "MODEL", "--out", "new"]
CACHE = ["cache-trajectories", "cache.yaml", "--out"]
CONVERT = ["convert", "MODEL", "--out"]
SINGLE = ["convert", "MODEL", "--to", "original", "--out"]
EVALUATE = ["evaluate", "MODEL", "--prompts", "prompts.txt", "--out"]
LONG = "x" * 300

#: command, its bad input, and the expected parts of its one line
REFUSED = [
    (GRID, "grid.webp", "grid.webp: a picture of 64 x 16630 pixels cannot be saved as WEBP", "limit of 16383"),
    ([*GRID[:-1], "--height", "272", "-o"], "grid.jpg", "grid.jpg: a picture of 64 x 69046 pixels", "limit is 65,500"),
    ([*GRID[:-1], "--height", "272", "-o"], "grid.gif", "grid.gif: a picture of 64 x 69046 pixels", "saved as GIF"),
    (GRID, "grid.ico", "grid.ico: a picture of 64 x 16630 pixels cannot be saved as ICO", "use .png, or a folder"),
    (GRID, "grid.psd", "grid.psd: .psd is not an image format", "use .png, or a folder"),
    (GRID, "grid.xbm", "grid.xbm: a picture cannot be saved as XBM (cannot write mode RGB", "use .png"),
    (GRID, "grid.h5", "grid.h5: a picture cannot be saved as HDF5 (HDF5 save handler not installed)", "use .png"),
    (GRID, "pictures.v2", "pictures.v2: .v2 is not an image format; use .png, or a folder (its name ends with /)", ""),
    (GRID, "taken", "taken: a name without an ending is not an image format", ""),
    (FOLDER, "taken/", "taken: cannot write here (it is a file, not a folder)", ""),
    (GRID, "taken/grid.png", "taken: cannot write here (it is a file, not a folder)", ""),
    (GRID, f"{LONG}.png", f"{LONG}.png: cannot write here (File name too long)", ""),
    (GRID, f"{UNWRITABLE}/grid.png", f"{UNWRITABLE}/grid.png: cannot write here", ""),
    (FOLDER, f"{UNWRITABLE}/", f"{UNWRITABLE}: cannot write here", ""),
    (EVALUATE, "taken", "taken: cannot write here (it is a file, not a folder)", ""),
    (EVALUATE, "report", "report/index.html: is a folder; give the name of a file", ""),
    (EVALUATE, str(UNWRITABLE), f"{UNWRITABLE}/metrics.json: cannot write here", ""),
    ([*EVALUATE, "new", "--features"], "guess", "guess", ""),
    ([*EVALUATE, "new", "--scorer"], "guess", "guess", ""),
    ([*EVALUATE, "new", "--scorer"], "clip_score:./nowhere", "./nowhere: no such folder", ""),
    (ENCODE, "taken", "taken: cannot write here (it is a file, not a folder)", ""),
    (ENCODE, "finished", "finished already holds encoded prompts; use another --out, or --overwrite", ""),
    ([*ENCODE, "folder"], "--overwrite", "folder/notes.txt was not written by fewstep encode-prompts", ""),
    (ENCODE, str(UNWRITABLE), f"{UNWRITABLE}: cannot write here", ""),
    (SOURCE, "prompts.docx", "prompts.docx: No such file or folder; prompts come from .txt, .jsonl, .json", ""),
    (SOURCE, "missing.txt", "missing.txt: No such file", ""),
    (CACHE, "taken", "taken: cannot write here (it is a file, not a folder)", ""),
    (CACHE, "folder", "folder: has files but no index.json; use another --out", ""),
    (CACHE, "finished", "index.json: cannot be read", ""),
    (CACHE, str(UNWRITABLE), f"{UNWRITABLE}: cannot write here", ""),
    ([*CACHE, "new", "-s"], "prompts.source=missing.txt", "missing.txt: No such file", ""),
    (CONVERT, "taken", "taken: already exists; choose another --out", ""),
    (CONVERT, "folder", "folder: already exists; choose another --out", ""),
    (CONVERT, "new.safetensors", "new.safetensors: --to diffusers writes a folder", "--to original"),
    (CONVERT, "taken/model", "taken: cannot write here (it is a file, not a folder)", ""),
    (CONVERT, f"{UNWRITABLE}/model", f"{UNWRITABLE}/model: cannot write here", ""),
    (SINGLE, "new.bin", "new.bin: the name of the file must end with .safetensors", ""),
    (SINGLE, f"{UNWRITABLE}/a.safetensors", f"{UNWRITABLE}/a.safetensors: cannot write here", ""),
    (["distill", "recipe.yaml", "--out"], "taken", "taken: cannot write here", ""),
    (["distill", "recipe.yaml", "--out"], str(UNWRITABLE), f"{UNWRITABLE}: cannot write here", ""),
    (["distill", "recipe.yaml", "-s"], "evaluate.prompts=missing.txt", "unknown key evaluate.prompts", ""),
    (["distill", "recipe.yaml", "-s"], "prompts.test_source=missing.txt", "missing.txt: No such file", ""),
    (["emoji", "sheet", "--out"], "sheet.xcf", "sheet.xcf: .xcf is not an image format", ""),
    (["emoji", "sheet", "--out"], f"{UNWRITABLE}/a.png", f"{UNWRITABLE}/a.png: cannot write here", ""),
    (["emoji", "gallery", "--out"], "gallery.bin", "gallery.bin: the name of the file must end with .safetensors", ""),
    (["emoji", "gallery", "--out"], "taken/a.safetensors", "taken: cannot write here (it is a file", ""),
    (["emoji", "build", "--out"], "taken", "taken: cannot write here (it is a file, not a folder)", ""),
    (["emoji", "publish", "folder", "--out"], "folder", "folder: holds other files than a model", ""),
    (["emoji", "publish", "folder", "--out"], "new", "folder/metrics.jsonl: cannot be read", ""),
    (["emoji", "train", "classifier", "--out"], "taken", "taken: cannot write here", ""),
]


@pytest.mark.parametrize(("words", "value", "expected", "more"), REFUSED)
def test_output_that_cannot_be_written_is_refused_before_the_work(
    inputs: Path, no_model: None, tiny_folder: Path, words: list[str], value: str, expected: str, more: str
) -> None:
    before = files(inputs)
    done = run(*(str(tiny_folder) if word == "MODEL" else word for word in words), value)
    assert_one_line(done, expected, more)
    assert done.stdout == ""
    left = [name for name in files(inputs) if name not in before]
    assert left in ([], ["new"])  # an empty folder at most


def test_full_disk_is_found_before_the_work(inputs: Path, no_model: None, tiny_folder: Path) -> None:
    with file_size_limit(1000):  # nothing but small files fits
        for words, out in ((GRID, "a.png"), (FOLDER, "new/"), (ENCODE, "new"), (CACHE, "new"), (CONVERT, "model")):
            done = run(*(str(tiny_folder) if word == "MODEL" else word for word in words), out)
            assert_one_line(done, Path(out), "cannot write here (File too large)")


def test_the_wide_grid_that_does_fit(inputs: Path, tiny_folder: Path) -> None:
    """One image less than WebP's limit; and the picture's size is the checked one."""
    words = ["generate", tiny_folder, *(f"fox {number}" for number in range(9)), "--steps", 1, "--columns", 2]
    assert run(*words, "-o", "grid.webp").exit_code == 0
    with Image.open("grid.webp") as grid:
        assert (grid.format, grid.size) == ("WEBP", (2 * 66 - 2, 5 * 66 - 2))
    check_image("a.webp", 66 * 248 - 2, 64)
    with pytest.raises(UserError, match="16383"):
        check_image("a.webp", 66 * 249 - 2, 64)


def test_names_of_files_and_folders(inputs: Path) -> None:
    Path("pictures.v2").mkdir()
    expected = {
        "grid.png": False, "new": True, "new.v2/": True, "new.v2": False, "pictures.v2": True, "folder": True,
        "taken": False, "taken/": True, ".": True, ".hidden": True,
    }  # fmt: skip
    assert {name: names_folder(name) for name in expected} == expected


def test_a_folder_with_a_dot_in_its_name(inputs: Path, tiny_folder: Path) -> None:
    Path("pictures.v2").mkdir()
    for out, written in (("pictures.v2", "pictures.v2/0000.png"), ("new.png/", "new.png/0000.png")):
        done = run("generate", tiny_folder, "a fox", "--steps", 1, "-o", out)
        assert done.exit_code == 0, done.output
        assert Path(written).is_file()


def test_resumed_run_whose_checkpoints_cannot_be_written(tmp_path: Path) -> None:
    with RunDir(tmp_path, tiny_recipe()):
        pass
    (tmp_path / "checkpoints").symlink_to(UNWRITABLE)
    with pytest.raises(UserError, match="checkpoints: cannot write here"):
        RunDir(tmp_path, tiny_recipe())


def test_saving_a_model_deletes_no_other_files(tmp_path: Path, tiny: TextToImagePipeline) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="home: holds other files than a model, and saving would delete them"):
        tiny.save(tmp_path / "home")
    assert files(tmp_path) == ["home", "home/notes.txt"]
    (tmp_path / "model").mkdir()
    tiny.save(tmp_path / "model")
    tiny.save(tmp_path / "model")  # an earlier model is replaced


def test_checks_leave_nothing(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b")
    check_file(tmp_path / "c" / "d.txt")
    check_image(tmp_path / "e" / "f.jpg", 100, 100)
    assert files(tmp_path) == []


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "ppm", "avif", "jp2", "pdf", "tga"])
def test_usual_formats_are_accepted_and_written(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    for size in ((66, 66), (1214, 1000)):
        check_image(file, *size)
    write_image(Image.new("RGB", (66, 66)), file)
    assert file.stat().st_size > 0


def test_picture_that_turns_out_too_large_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a.webp: cannot be saved as WEBP \(.*16383") as refused:
        write_image(Image.new("RGB", (1, 16384)), tmp_path / "a.webp")
    assert "\n" not in str(refused.value)
    assert files(tmp_path) == []


def test_characters_that_file_names_cannot_have(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write here \(embedded null byte\)"):
        check_file(tmp_path / "a\0b.png")
    with pytest.raises(UserError, match="cannot write here"):
        check_folder(tmp_path / ("x" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot write here \(Permission denied\)"):
        check_folder(tmp_path)
