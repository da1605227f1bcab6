"""Full disks, quotas, locked databases and damaged files are one line that names the file, and leave no half of one."""

import errno
import json
import shutil
import sqlite3
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from limits import file_size_limit
from PIL import Image
from safetensors import SafetensorError
from tiny import tiny_recipe
from typer.testing import CliRunner, Result

from fewstep.cli.main import app
from fewstep.config.recipe import CacheRecipe
from fewstep.data.prepare_prompts import PROGRESS
from fewstep.data.prompt_files import read_texts
from fewstep.emoji.build import PACKAGES, read_package
from fewstep.errors import UserError
from fewstep.machine import describe, reading, reason, writing
from fewstep.training.run_dir import RunDir


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def assert_one_line(done: Result, *parts: object) -> None:
    assert done.exit_code == 1, (done.output, done.exception)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, (done.stderr, done.exception)
    for part in parts:
        assert str(part) in errors[0]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"a fox of number {number} in the deep snow\n" for number in range(60)))
    return file


def test_full_disk_in_convert_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    with file_size_limit(30_000):
        folder = run("convert", tiny_folder, "--out", tmp_path / "copy")
        file = run("convert", tiny_folder, "--out", tmp_path / "one.safetensors", "--to", "comfyui")
    assert_one_line(folder, tmp_path / "copy", "cannot be written", "File too large")
    assert_one_line(file, tmp_path / "one.safetensors", "cannot be written", "File too large")
    assert files(tmp_path) == before


def test_full_disk_in_encode_prompts_leaves_nothing_in_the_way(
    tiny_folder: Path, tmp_path: Path, prompts: Path
) -> None:
    words = ["encode-prompts", prompts, "--model", tiny_folder, "--out", tmp_path / "out", "--shard-size", 20]
    with file_size_limit(30_000):
        done = run(*words)
    assert_one_line(done, "shard-00000.safetensors", "cannot be written", "File too large")
    assert files(tmp_path / "out") == []
    assert run(*words).exit_code == 0
    whole = run(*words[:-3], tmp_path / "whole", "--shard-size", 20)
    assert whole.exit_code == 0
    for name in files(tmp_path / "whole"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_full_disk_under_the_database(tiny_folder: Path, tmp_path: Path, prompts: Path) -> None:
    with file_size_limit(8192):
        done = run("encode-prompts", prompts, "--model", tiny_folder, "--out", tmp_path / "out")
    assert_one_line(done, tmp_path / "out" / PROGRESS, "cannot be written", "the same command resumes")


def test_full_disk_in_cache_trajectories(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = CacheRecipe(
        kind="cache_trajectories", name="cache", teacher=str(tiny_folder), steps=2, num_trajectories=8, shard_size=8,
        teacher_steps_per_student_step=1, precision="fp32",
    )  # fmt: skip
    file = tmp_path / "cache.yaml"
    file.write_text(json.dumps(recipe.model_dump(mode="json")))
    with file_size_limit(20_000):
        done = run("cache-trajectories", file, "--out", tmp_path / "out")
    assert_one_line(done, "shard-00000.safetensors", "cannot be written", "File too large")
    assert files(tmp_path / "out") == ["index.json"]


def log_a_thousand_steps(opened: RunDir) -> None:
    for step in range(1000):
        opened.log(step, {"loss": step / 3})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
def test_full_disk_under_logs_and_previews(tmp_path: Path) -> None:
    opened = RunDir(tmp_path / "run", tiny_recipe())
    opened.track(0)
    full = r"(metrics.jsonl|events.out.tfevents): cannot be written \(File too large\)"
    with file_size_limit(8192), pytest.raises(UserError, match=full):
        log_a_thousand_steps(opened)
    noise = Image.effect_noise((200, 200), 90)
    with file_size_limit(8192), pytest.raises(UserError, match=r"step_000003.png: cannot be written \(File too large"):
        opened.preview(3, noise)
    with pytest.raises(UserError, match=r"events.out.tfevents: cannot be written"):
        opened.close()
    assert files(tmp_path / "run" / "previews") == []
    RunDir(tmp_path / "run", tiny_recipe())  # it was unlocked in spite of the error


def test_locked_database(tiny_folder: Path, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect
    (tmp_path / "out").mkdir()
    other = connect(tmp_path / "out" / PROGRESS)
    other.execute("create table taken (x)")
    other.execute("begin exclusive")
    monkeypatch.setattr(sqlite3, "connect", lambda file: connect(file, timeout=0.1))
    done = run("encode-prompts", prompts, "--model", tiny_folder, "--out", tmp_path / "out")
    other.close()
    assert_one_line(done, tmp_path / "out" / PROGRESS, "cannot be written (database is locked)")


def test_file_that_is_no_database(tiny_folder: Path, tmp_path: Path, prompts: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / PROGRESS).write_bytes(b"no database" * 100)
    done = run("encode-prompts", prompts, "--model", tiny_folder, "--out", tmp_path / "out")
    assert_one_line(done, tmp_path / "out" / PROGRESS, "cannot be read (file is not a database); use --overwrite")


@pytest.mark.parametrize("compression", ["snappy", "gzip", "zstd", "none"])
def test_damaged_parquet_pages(tmp_path: Path, compression: str) -> None:
    file = tmp_path / "prompts.parquet"
    texts = [f"a fox of number {number} {hash(number) ** 3}" for number in range(5000)]
    pq.write_table(pa.table({"prompt": texts}), file, compression=compression, use_dictionary=False)
    content = bytearray(file.read_bytes())
    content[4:2004] = b"\xff" * 2000  # the footer, which is read first, is whole
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"prompts.parquet: cannot be read") as refused:
        list(read_texts(str(file)))
    assert "\n" not in str(refused.value)


def test_damaged_package_of_the_emoji_build(tmp_path: Path) -> None:
    archive = tmp_path / f"emoji-datasource-google-{PACKAGES['emoji-datasource-google']}.tgz"
    archive.write_bytes(b"\x1f\x8b\x08\x00" + b"\xff" * 500)
    with pytest.raises(UserError, match=r"emoji-datasource-google-16.0.0.tgz: cannot be read"):
        read_package(tmp_path, "emoji-datasource-google", "img/")


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO])
def test_shortage_that_names_no_file_is_no_bug(code: int) -> None:
    assert describe(OSError(code, "Disk quota exceeded")) == "Disk quota exceeded"
    assert describe(OSError(code, "Disk quota exceeded", "a.png")) == "a.png: Disk quota exceeded"


def test_other_system_errors_without_a_file_may_be_bugs() -> None:
    assert describe(OSError(errno.EPERM, "Operation not permitted")) is None
    assert describe(OSError("a library's own")) is None


def test_reasons_are_one_line() -> None:
    assert reason(SafetensorError("I/O error:\n no space")) == "I/O error: no space"
    assert reason(OSError("cannot write mode RGB as XBM")) == "cannot write mode RGB as XBM"  # it has no strerror
    assert reason(EOFError()) == "EOFError"
    assert len(reason(OSError("x" * 5000))) == 200


def test_failed_copies_name_the_first_reason(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"b: cannot be written \(.*No such file.*\)$") as refused, writing("b"):
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert "[(" not in str(refused.value)


def test_a_file_that_was_read_is_named_rather_than_the_one_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^/nowhere/in.txt: "), writing(tmp_path / "out.txt"):
        Path("/nowhere/in.txt").read_text()


def test_advice_is_in_the_line() -> None:
    with pytest.raises(UserError, match=r"^x.db: cannot be read \(locked\); wait$"), reading("x.db", "wait"):
        raise sqlite3.OperationalError("locked")
