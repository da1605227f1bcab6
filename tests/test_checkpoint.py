"""Checkpoints: complete or skipped; and run directories: resumed, refused or overwritten."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import fit, tiny_recipe, tiny_trainer

from fewstep.config.load import load_recipe
from fewstep.errors import UserError
from fewstep.training import checkpoint
from fewstep.training.run_dir import RunDir
from fewstep.training.tracking import RunningMeans, Tracker, read_metrics


def write(directory: Path, step: int, keep: int = 9) -> Path:
    groups = {"random": {"cpu": torch.arange(5)}, "one.weights": {"w": torch.full((2, 3), float(step)).T}}
    return checkpoint.save(directory, step, groups, {"position": 3 * step}, keep)


def test_saved_tensors_and_state_are_loaded(tmp_path: Path) -> None:
    found = checkpoint.load(write(tmp_path, 7))
    assert (found.step, found.state) == (7, {"position": 21})
    assert torch.equal(found.read("one.weights")["w"], torch.full((3, 2), 7.0))
    assert torch.equal(found.read("random")["cpu"], torch.arange(5))
    assert not list(tmp_path.glob(".*"))


def test_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 100, 1000):
        write(tmp_path, step, keep=2)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step_00000100", "step_00001000"]


SHARD = "shard-00001-model-00001-of-00001.safetensors"


def flip_a_byte(path: Path) -> None:
    data = bytearray((path / SHARD).read_bytes())
    data[-1] ^= 1
    (path / SHARD).write_bytes(data)


def test_protected_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        groups = {"one": {"w": torch.zeros(1)}}
        checkpoint.save(tmp_path, step, groups, {}, keep=1, protect=[2])
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step_00000002", "step_00000004"]


def test_other_shapes_and_names_are_refused(tmp_path: Path) -> None:
    found = checkpoint.load(write(tmp_path, 7))
    with pytest.raises(RuntimeError, match=r"w has shape \(3, 2\) there and \(2, 3\) here"):
        found.load_into("one.weights", {"w": torch.zeros(2, 3)})
    with pytest.raises(RuntimeError, match="its tensors differ: v, w"):
        found.load_into("one.weights", {"v": torch.zeros(3, 2)})


DAMAGE = {
    "damaged": (flip_a_byte, f"{SHARD} is damaged"),
    "cut off": (lambda path: (path / SHARD).write_bytes(b"abc"), f"{SHARD} is damaged"),
    "file missing": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (lambda path: (path / "manifest.json").write_text('{"format": 2, "st'), "cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_corrupt_checkpoint_is_skipped_and_named(tmp_path: Path, kind: str) -> None:
    write(tmp_path, 5)
    newest = write(tmp_path, 10)
    damage, reason = DAMAGE[kind]
    damage(newest)
    notices: list[str] = []
    found = checkpoint.latest(tmp_path, notices.append)
    assert found is not None
    assert found.step == 5
    assert len(notices) == 1
    assert "step_00000010: skipped" in notices[0]
    assert reason in notices[0]


@pytest.mark.parametrize("number", [1, 99])
def test_checkpoint_of_another_format_is_refused(tmp_path: Path, number: int) -> None:
    """It is never skipped: that would start the training over."""
    fit(tiny_trainer(tmp_path, steps=5))
    manifest = tmp_path / "checkpoints" / "step_00000005" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": number}))
    with pytest.raises(UserError, match=rf"step_00000005: has checkpoint format {number}, .* reads format 2"):
        fit(tiny_trainer(tmp_path, steps=8))


def test_interrupted_write_is_ignored_and_deleted(tmp_path: Path) -> None:
    write(tmp_path, 5)
    torn = tmp_path / ".step_00000010.partial"
    torn.mkdir()
    (torn / "manifest.json").write_text("{}")
    found = checkpoint.latest(tmp_path, pytest.fail)
    assert found is not None
    assert found.step == 5
    write(tmp_path, 10)
    assert not torn.exists()


def test_corrupt_newer_checkpoint_does_not_replace_good_ones(tmp_path: Path) -> None:
    """After a fall back from a corrupt step 20 to 10, saving 15 keeps 10 and 15; saving 20 replaces 20."""
    write(tmp_path, 10)
    flip_a_byte(write(tmp_path, 20))
    write(tmp_path, 15, keep=2)
    assert [path.name[-2:] for path in checkpoint.list_checkpoints(tmp_path)] == ["10", "15", "20"]
    assert checkpoint.load(write(tmp_path, 20, keep=2)).step == 20


def test_training_resumes_from_the_last_complete_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = tiny_trainer(tmp_path / "whole", steps=10)
    fit(whole)
    expected = whole.train_states[0].weights["0.weight"].detach().clone()
    fit(tiny_trainer(tmp_path / "run", steps=10))
    flip_a_byte(tmp_path / "run" / "checkpoints" / "step_00000010")
    again = tiny_trainer(tmp_path / "run", steps=10)
    fit(again)
    output = capfd.readouterr().err
    assert f"step_00000010: skipped, {SHARD} is damaged" in output
    assert "resuming from step 5" in output
    assert torch.equal(again.train_states[0].weights["0.weight"], expected)


def test_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    write(tmp_path, 5)
    program = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_checkpoint
from fewstep.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # no file may grow beyond 100 bytes, as on a full disk
try:
    test_checkpoint.write(Path({str(tmp_path)!r}), 10, keep=1)
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "step_00000010: this checkpoint cannot be written" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]
    assert checkpoint.load(tmp_path / "step_00000005").step == 5


# --- run directories ---


def test_recipe_is_saved_resolved(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    RunDir(tmp_path, recipe)
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert "max_checkpoints: 2" in (tmp_path / "recipe.yaml").read_text()


def test_another_recipe_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    RunDir(tmp_path, tiny_recipe(seed=1)).track(0)
    before = (tmp_path / "recipe.yaml").read_text()
    changed = tiny_recipe(seed=2, log_every=3)
    changed.optim.lr = 0.5
    with pytest.raises(UserError) as refused:
        RunDir(tmp_path, changed)
    message = str(refused.value)
    assert "train.seed: 1 -> 2" in message
    assert "optim.lr: 0.01 -> 0.5" in message
    assert "log_every" not in message
    assert "--overwrite" in message
    assert "\n" not in message
    assert (tmp_path / "recipe.yaml").read_text() == before


def test_recipe_without_results_is_replaced(tmp_path: Path) -> None:
    RunDir(tmp_path, tiny_recipe(seed=1))
    RunDir(tmp_path, tiny_recipe(seed=2))
    assert "seed: 2" in (tmp_path / "recipe.yaml").read_text()


def test_longer_is_the_same_recipe_and_shorter_is_not(tmp_path: Path) -> None:
    RunDir(tmp_path, tiny_recipe(steps=12)).track(0)
    RunDir(tmp_path, tiny_recipe(steps=20, save_every=7, sample_every=3, num_threads=1, max_checkpoints=1))
    with pytest.raises(UserError, match=r"train\.steps: 20 -> 12"):
        RunDir(tmp_path, tiny_recipe(steps=12))


def test_longer_training_resumes(tmp_path: Path) -> None:
    fit(tiny_trainer(tmp_path, steps=5))
    longer = tiny_trainer(tmp_path, steps=8)
    fit(longer)
    assert (longer.step, longer.train_states[1].counters["updates"]) == (8, 16)


def test_recipe_without_newer_keys_is_the_same(tmp_path: Path) -> None:
    """A missing key has its default."""
    RunDir(tmp_path, tiny_recipe())
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "weight_decay" not in line))
    RunDir(tmp_path, tiny_recipe())


def test_overwrite_deletes_only_what_a_run_makes(tmp_path: Path) -> None:
    fit(tiny_trainer(tmp_path, steps=5))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "student").mkdir()
    trainer = tiny_trainer(tmp_path, overwrite=True, steps=6, seed=3)
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["notes.txt", "recipe.yaml"]
    fit(trainer)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / "student").exists()
    assert trainer.position == 18
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [4, 6]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(directory.rglob("*"))}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_refused_run_leaves_the_directory_as_it_was(tmp_path: Path, overwrite: bool) -> None:
    earlier = tmp_path / "earlier"
    if overwrite:
        fit(tiny_trainer(earlier, steps=5)).run.close()
    before = contents(tmp_path)
    run = RunDir(earlier, tiny_recipe(seed=4), overwrite=overwrite, fingerprints={"teacher": "x"})
    with pytest.raises(UserError, match="no such teacher"), run:
        raise UserError("no such teacher")
    assert contents(tmp_path) == before


def test_a_run_that_has_begun_is_kept_after_an_error(tmp_path: Path) -> None:
    run = RunDir(tmp_path, tiny_recipe())
    run.track(0)
    with pytest.raises(UserError, match="a full disk"), run:
        raise UserError("a full disk")
    assert (tmp_path / "recipe.yaml").exists()


def test_directory_that_is_not_a_run_keeps_its_files(tmp_path: Path) -> None:
    """ "--overwrite" in an unrelated project must not delete their `model` folder."""
    (tmp_path / "model").mkdir()
    for overwrite in (False, True):
        with pytest.raises(UserError, match="model is in the way"):
            RunDir(tmp_path, tiny_recipe(), overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_directory_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write here"):
        RunDir(tmp_path / "file" / "run", tiny_recipe())


def test_second_process_in_a_directory_is_refused(tmp_path: Path) -> None:
    with RunDir(tmp_path, tiny_recipe()), pytest.raises(UserError, match="another process is using"):
        RunDir(tmp_path, tiny_recipe())
    RunDir(tmp_path, tiny_recipe())


def test_interruption_outside_of_training_prints_how_to_resume(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt, match="resume with: make it"),
        RunDir(tmp_path, tiny_recipe(), resume_command="make it"),
    ):
        raise KeyboardInterrupt


# --- metrics ---


def test_nonfinite_metrics_are_null(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 0)
    tracker.log(1, {"loss": float("nan"), "rate": 0.5})
    tracker.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "rate": 0.5}


def test_resuming_drops_later_and_incomplete_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    Tracker(tmp_path, 2).close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_running_means() -> None:
    means = RunningMeans()
    means.add({"a": 1.0, "b": 5.0})
    means.add({"a": 2.0})
    means = RunningMeans(json.loads(json.dumps(means.state())))
    means.add({"a": 6.0})
    assert means.take() == {"a": 3.0, "b": 5.0}
    assert means.take() == {}
