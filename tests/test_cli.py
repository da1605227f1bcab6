"""The command line: one clear line for every mistake, exit codes, interruption and resumption."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import TinyMethod, tiny_source
from typer.testing import CliRunner, Result

from fewstep.cli.main import app
from fewstep.config.recipe import DistillRecipe
from fewstep.errors import UserError
from fewstep.training.run_dir import RunDir, current_command
from fewstep.training.trainer import Trainer

RECIPE = """\
kind: distill
name: tiny
teacher: micro
method: {name: dmd, terms: {cfg_augmentation: {}, distribution_matching: {}}}
optim: {student: {lr: 0.01}, fake_score: {lr: 0.02}}
train: {steps: 6, batch_size: 4, log_every: 1}
evaluate: {enabled: false, validate_every: 0}
"""


def fewstep(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in the working directory, and a distillation of two linear layers in place of the real one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fewstep.api._distill", distill_two_layers)
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def distill_two_layers(recipe: DistillRecipe, run: RunDir, validator: object, dist: object) -> Path:
    method = TinyMethod()
    method.pause = float(os.environ.get("PAUSE", 0))
    if recipe.teacher == "bug":
        raise ZeroDivisionError("a bug")
    if recipe.teacher == "full":
        raise OSError(28, "No space left on device", str(run.directory / "x"))
    optim = {"first": recipe.optim["student"], "second": recipe.optim["fake_score"]}
    Trainer(method, tiny_source, run, train=recipe.train, optim=optim).fit()
    return run.directory / "student"


def test_run_has_its_directory_and_resumes(recipe: Path) -> None:
    first = fewstep("distill", "tiny.yaml")
    assert first.exit_code == 0, first.output
    assert first.stdout == f"student: {Path('runs/tiny/student')}\n"
    assert {"recipe.yaml", "metrics.jsonl", "checkpoints"} <= {path.name for path in Path("runs/tiny").iterdir()}
    again = fewstep("distill", "tiny.yaml", "-s", "train.steps=8")
    assert "from step 6" in again.stderr
    assert Path("runs/tiny/checkpoints/step_00000008").is_dir()


def test_other_recipe_is_refused_unless_overwritten(recipe: Path) -> None:
    assert fewstep("distill", recipe, "--out", "here").exit_code == 0
    refused = fewstep("distill", recipe, "--out", "here", "-s", "optim.fake_score.lr=0.5", "--set", "train.seed=3")
    assert refused.exit_code == 1
    assert "optim.fake_score.lr: 0.02 -> 0.5" in refused.stderr
    assert "train.seed: 0 -> 3" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert "--overwrite" in refused.stderr
    anew = fewstep("distill", recipe, "--out", "here", "-s", "optim.fake_score.lr=0.5", "--overwrite")
    assert anew.exit_code == 0
    assert "from step" not in anew.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill", "nothing.yaml"], "error: nothing.yaml: no such recipe file"),
        (["distill", "tiny.yaml", "-s", "train.step=4"], "unknown key train.step; did you mean train.steps?"),
        (["emoji", "train", "tiny.yaml"], "its kind is distill; use: fewstep distill tiny.yaml"),
        (["distill", "classifier"], "its kind is classifier; use: fewstep emoji train classifier"),
        (["distill", "tiny.yaml", "--out", "tiny.yaml"], "error: tiny.yaml: cannot write here"),
        (["distill", "tiny.yaml", "-s", "teacher=full"], "x: No space left on device"),
        (["generate", "nowhere", "a cat"], "error: nowhere: "),
        (["generate", "nowhere"], "error: no prompts"),
        (["generate", "nowhere", "--prompts-file", "empty.txt"], "error: empty.txt: no prompts in it"),
        (["generate", "nowhere", "--prompts-file", "missing.txt"], "error: missing.txt: No such file"),
        (["generate", "nowhere", "a cat", "--sampler", "guess"], "error: sampler: input should be 'euler' or 'sde'"),
        (["generate", "nowhere", "a cat", "-o", "cat.docx"], "error: cat.docx: .docx is not an image format"),
        (["generate", "nowhere", "a cat", "-o", "tiny.yaml/cat.png"], "error: tiny.yaml: cannot write here"),
        (["generate", "micro", "a cat", "--device", "gpu"], "error: device gpu: not a device"),
        (["generate", "micro", "a cat", "--device", "cuda:99"], "error: device cuda:99: not available here"),
        (["evaluate", "micro", "--device", "cuda:99"], "error: device cuda:99: not available here"),
        (["evaluate", "nowhere", "--prompts", "empty.txt"], "error: empty.txt: no prompts in it"),
        (["evaluate", "nowhere"], "error: nowhere: "),
        (["convert", "micro", "--out", "x", "--components-from", "y"], "error: --components-from: no effect on micro"),
        (["plan", "micro-ca", "--gpu", "nan"], "error: --gpu nan: give a size such as 24GB"),
    ],
)
def test_mistake_is_one_line_and_exit_code_1(recipe: Path, words: list[str], message: str) -> None:
    Path("empty.txt").write_text("\n  \n")
    done = fewstep(*words)
    assert done.exit_code == 1, done.output
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_bug_keeps_its_traceback(recipe: Path) -> None:
    done = fewstep("distill", recipe, "-s", "teacher=bug")
    assert isinstance(done.exception, ZeroDivisionError)


def test_wrong_usage_is_exit_code_2() -> None:
    assert fewstep("generate").exit_code == 2
    assert fewstep("generate", "micro", "x", "--steps", "0").exit_code == 2
    assert fewstep("conjure").exit_code == 2


@pytest.mark.parametrize(
    ("recipe", "module", "kind"),
    [
        ("micro-vae", "train_vae", "VAERecipe"),
        ("micro-text-encoder", "train_text_encoder", "TextEncoderRecipe"),
        ("micro-teacher", "train_flow_matching", "FlowMatchingRecipe"),
        ("classifier", "train_classifier", "ClassifierRecipe"),
    ],
)
def test_emoji_train_dispatches_by_kind(
    recipe: str, module: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def train(recipe: object, run: RunDir) -> Path:
        trained.append(type(recipe).__name__)
        return run.directory / "model"

    monkeypatch.setattr(f"fewstep.emoji.{module}.train", train)
    done = fewstep("emoji", "train", recipe, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert trained == [kind]
    assert done.stdout == f"{tmp_path / 'run' / 'model'}\n"


def test_emoji_train_resumes_and_overwrites(tmp_path: Path) -> None:
    words = ["emoji", "train", "classifier", "--out", tmp_path / "run"]
    small = ["train.batch_size=4", "train.log_every=1", "base_channels=8", "data.num_objects=2"]
    for override in small:
        words += ["-s", override]
    assert fewstep(*words, "-s", "train.steps=2").exit_code == 0
    resumed = fewstep(*words, "-s", "train.steps=3")
    assert resumed.stdout == f"{tmp_path / 'run' / 'model'}\n"
    assert [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").open()] == [1, 2, 3]
    assert fewstep(*words, "-s", "train.steps=1").exit_code == 1
    assert fewstep(*words, "-s", "train.steps=1", "--overwrite").exit_code == 0
    assert [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").open()] == [1]


def test_emoji_sheet_shows_every_object_in_every_style(tmp_path: Path) -> None:
    done = fewstep("emoji", "sheet", "--out", tmp_path / "sheet.png")
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (26 * 66 - 2, 15 * 66 - 2)  # 3 styles of 130 objects, 64 px with gaps of 2


def test_help_lists_all_commands_without_importing_torch() -> None:
    program = (
        "import atexit, sys; import fewstep, fewstep.cli.main as m; sys.argv = ['fewstep', '--help']; "
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); m.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "False\n")
    for command in (
        "distill",
        "generate",
        "evaluate",
        "plan",
        "encode-prompts",
        "cache-trajectories",
        "convert",
        "export",
        "emoji",
    ):
        assert command in done.stdout


def test_plugin_that_cannot_be_imported_is_one_line() -> None:
    environment = os.environ | {"FEWSTEP_PLUGINS": "nowhere.py"}
    words = [sys.executable, "-m", "fewstep", "--help"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: FEWSTEP_PLUGINS: nowhere.py cannot be imported")
    assert done.stderr.count("\n") == 1


def test_options_of_generate_are_in_its_help() -> None:
    shown = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
    for option in ("--dtype", "--offload", "--vae-tiling", "--attention-backend", "--sampler", "--batch-size"):
        assert option in shown


def test_python_m_fewstep_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fewstep", "distill", "nothing.yaml"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: nothing.yaml: no such recipe file")
    assert done.stderr.count("\n") == 1


def test_resume_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEWSTEP_RESUME_COMMAND", raising=False)
    monkeypatch.setattr(
        sys, "argv", ["/x/fewstep/__main__.py", "distill", "a b.yaml", "--overwrite", "-s", "train.seed=1"]
    )
    assert current_command().endswith("-m fewstep distill 'a b.yaml' -s train.seed=1")
    program = tmp_path / "bin" / "fewstep"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(program), "distill", "r.yaml"])
    monkeypatch.setenv("PATH", "/nowhere")
    assert current_command() == f"{Path('bin/fewstep')} distill r.yaml"
    monkeypatch.setenv("PATH", str(program.parent))
    assert current_command() == "fewstep distill r.yaml"
    monkeypatch.setenv("FEWSTEP_RESUME_COMMAND", "make demo")
    assert current_command() == "make demo"


def test_ctrl_c_saves_and_shows_the_resume_command(recipe: Path) -> None:
    """The program in another process is interrupted; the same command in this one resumes."""
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_cli, fewstep.api; "
        "import fewstep.cli.main as m; fewstep.api._distill = test_cli.distill_two_layers; sys.argv[0] = 'fewstep'; "
        "m.main()"
    )
    words = [sys.executable, "-c", program, "distill", "tiny.yaml", "--overwrite"]
    process = subprocess.Popen(words, env=os.environ | {"PAUSE": "0.5"}, stderr=subprocess.PIPE, text=True)
    while not (Path("runs/tiny/metrics.jsonl").exists() and Path("runs/tiny/metrics.jsonl").read_text()):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("saved step ")
    assert stderr.splitlines()[-1].endswith(": fewstep distill tiny.yaml")
    torch.set_num_threads(1)
    again = fewstep("distill", "tiny.yaml")
    assert again.exit_code == 0
    assert "from step" in again.stderr
    assert "step 6/6" in again.stderr


def test_ctrl_c_before_the_first_step(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def distill(recipe: DistillRecipe, run: RunDir, validator: object, dist: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr("fewstep.api._distill", distill)
    monkeypatch.setenv("FEWSTEP_RESUME_COMMAND", "make demo")
    done = fewstep("distill", recipe)
    assert done.exit_code == 130
    assert done.stderr.startswith("interrupted; ")
    assert done.stderr.endswith(": make demo\n")


def test_user_error_during_a_run_is_one_line(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def distill(recipe: DistillRecipe, run: RunDir, validator: object, dist: object) -> Path:
        raise UserError("no such teacher")

    monkeypatch.setattr("fewstep.api._distill", distill)
    done = fewstep("distill", recipe)
    assert (done.exit_code, done.stderr) == (1, "error: no such teacher\n")
