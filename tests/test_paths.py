"""Paths in overrides, in a student's fewstep.json and in a run's recipe: taken as they are, found after a move."""

import json
import shlex
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_recipe

from fewstep import api
from fewstep.config.load import load_recipe
from fewstep.config.recipe import DistillRecipe, StagesRecipe
from fewstep.errors import UserError
from fewstep.models.components import resolve_model
from fewstep.models.fingerprint import model_fingerprint, path_fingerprint, recipe_fingerprints
from fewstep.models.generation_config import GenerationConfig, load_generation_config
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.stages import run_stages
from fewstep.training.run_dir import RunDir

WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


@pytest.fixture
def project(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a teacher, whose folder is the working directory."""
    shutil.copytree(tiny_folder, tmp_path / "project" / "models" / "v1 #2")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def save_student(tiny: TextToImagePipeline, folder: str, teacher: str) -> Path:
    config = GenerationConfig(steps=2, teacher=teacher, height=64, width=64)
    return tiny.with_transformer(tiny.transformer, config).save(folder).absolute()


def change(folder: Path) -> None:
    """Another training of the same architecture."""
    weights = load_file(folder / WEIGHTS)
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, folder / WEIGHTS, {"format": "pt"})


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["models/v1 #2", "C: models", "1e3", "007", "on", "@home", "*all", "- x", "{v1}", "2024-01-01", "a: b #c"]
)
@pytest.mark.parametrize("key", ["teacher", "init", "prompts.source", "trajectory.cache", "evaluate.features"])
def test_text_is_taken_as_it_is(key: str, path: str) -> None:
    found = load_recipe("micro-aligned", [f"{key}={path}"])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == path


def test_quotes_null_and_other_types_are_yaml() -> None:
    words = ["teacher='a #b'", 'init="x: y"', "prompts.test_source=null", "train.steps=700", "train.keep_best=null"]
    found = load_recipe("micro-aligned", words)
    assert isinstance(found, DistillRecipe)
    assert (found.teacher, found.init, found.prompts.test_source, found.train.steps) == ("a #b", "x: y", None, 700)
    found = load_recipe("micro-aligned", ["evaluate.scorers=[emoji, 'clip_score:models/v1 #2']", "train.on_alert=off"])
    assert isinstance(found, DistillRecipe)
    assert found.evaluate.scorers == ["emoji", "clip_score:models/v1 #2"]
    assert found.train.on_alert == "off"


@pytest.mark.parametrize("word", ["train.steps=7 #00", "evaluate.scorers=[emoji] # clip", "models.rank=4   #8"])
def test_a_comment_in_a_value_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=r"YAML takes '#.*' for a comment; quote the value"):
        load_recipe("micro-aligned", [word])


def test_paths_in_commands_that_messages_give_are_quoted(tmp_path: Path) -> None:
    file = tmp_path / "my model #2.safetensors"
    with pytest.raises(UserError) as error:
        resolve_model(file)
    assert shlex.split(str(error.value).partition("first: ")[2])[2] == str(file)


def test_a_home_folder_is_found(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves ~ alone in -s teacher=~/models/x."""
    monkeypatch.setenv("HOME", str(project))
    assert resolve_model("~/models/v1 #2") == project / "models" / "v1 #2"


# --- a student's teacher ----------------------------------------------------------------------------------------------


def test_a_teacher_is_stored_by_its_path_from_the_student(project: Path, tiny: TextToImagePipeline) -> None:
    student = save_student(tiny, "runs/a/student", "models/v1 #2")
    assert json.loads((student / "fewstep.json").read_text())["teacher"] == "../../../models/v1 #2"
    for name in ("micro", "Tongyi-MAI/Z-Image"):
        assert load_generation_config(save_student(tiny, "runs/b/student", name)).teacher == name


@pytest.mark.parametrize("moved", ["nothing", "project", "student", "teacher", "student, out of the project"])
def test_a_moved_student_finds_its_teacher(
    project: Path, tiny: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch, moved: str
) -> None:
    student, teacher = save_student(tiny, "runs/a/student", "models/v1 #2"), project / "models" / "v1 #2"
    elsewhere = project.parent / "elsewhere"
    elsewhere.mkdir()
    if moved == "project":
        project = project.rename(project.parent / "renamed")
        student, teacher = project / "runs" / "a" / "student", project / "models" / "v1 #2"
    elif moved == "student":
        student = student.rename(project / "best")
    elif moved == "teacher":
        (project / "runs" / "models").mkdir()
        teacher = teacher.rename(project / "runs" / "models" / "v1 #2")
    elif moved == "student, out of the project":
        student = student.rename(elsewhere / "best")
    monkeypatch.chdir(project if "out" in moved else elsewhere)
    found = load_generation_config(student).teacher
    assert found is not None
    assert Path(found).samefile(teacher)
    assert load(found).transformer.dtype == torch.float32


def test_a_model_of_the_same_name_is_not_taken_for_the_teacher(project: Path, tiny: TextToImagePipeline) -> None:
    student = save_student(tiny, "runs/a/student", "models/v1 #2")
    away = (project / "models").rename(project / "away")
    shutil.copytree(away, project / "runs" / "models")
    change(project / "runs" / "models" / "v1 #2")
    found = load_generation_config(student).teacher
    assert found == str(project / "models" / "v1 #2")  # where it was: the message names it
    with pytest.raises(UserError, match=r"teacher, as in its fewstep.json, cannot be opened: .*models/v1 #2: no model"):
        api.evaluate(student, ["a fox", "a cat"])


def test_a_teacher_that_changed_is_named(project: Path, tiny: TextToImagePipeline) -> None:
    student = save_student(tiny, "runs/a/student", "models/v1 #2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_generation_config(student)
    change(project / "models" / "v1 #2")
    with pytest.warns(UserWarning, match=r"v1 #2: has changed since .*student was made"):
        assert load_generation_config(student).teacher == str(project / "models" / "v1 #2")


def test_the_paths_of_earlier_versions_are_found(
    project: Path, tiny: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were relative to the working directory of the run."""
    student = save_student(tiny, "runs/a/student", "micro")
    config = json.loads((student / "fewstep.json").read_text()) | {"teacher": "models/v1 #2"}
    del config["teacher_fingerprint"]
    (student / "fewstep.json").write_text(json.dumps(config))
    monkeypatch.chdir("/")
    assert load_generation_config(student).teacher == str(project / "models" / "v1 #2")


def test_a_copy_in_another_folder_names_the_same_teacher(project: Path, tiny: TextToImagePipeline) -> None:
    student = save_student(tiny, "runs/a/student", "models/v1 #2")
    copied = load(student).save(project / "deep" / "er" / "still" / "copy")
    assert load_generation_config(copied) == load_generation_config(student)
    assert json.loads((copied / "fewstep.json").read_text())["teacher"] == "../../../../models/v1 #2"


# --- fingerprints and runs --------------------------------------------------------------------------------------------


def test_a_fingerprint_depends_on_the_content_alone(project: Path) -> None:
    one = project / "models" / "v1 #2"
    other = shutil.copytree(one, project / "other")
    (other / "transformer" / "._config.json").write_bytes(b"\x00\x05\x16\x07")
    (other / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"x")
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps(config | {"_name_or_path": "runs/x"}))
    assert model_fingerprint(one) == model_fingerprint(other)
    (other / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.4}))
    assert model_fingerprint(one) != model_fingerprint(other)
    change(one)
    assert model_fingerprint(one) != model_fingerprint(shutil.copytree(other, project / "third"))


def test_a_large_file_is_told_apart_by_samples(tmp_path: Path) -> None:
    content = bytearray(3_000_000)
    found = []
    for place in (0, 1, 2_999_999):  # the first two are in the same sample
        content[place] = 1
        (tmp_path / "large").write_bytes(content)
        found.append(path_fingerprint(tmp_path / "large"))
    assert len(set(found)) == 3
    assert path_fingerprint(tmp_path / "nothing") is None


def distillation(*overrides: str) -> DistillRecipe:
    found = load_recipe("micro-aligned", overrides)
    assert isinstance(found, DistillRecipe)
    return found


def claim(directory: Path, *overrides: str) -> None:
    recipe = distillation(*overrides)
    with RunDir(directory, recipe, fingerprints=recipe_fingerprints(recipe)) as run:
        run.checkpoints.mkdir(exist_ok=True)


@pytest.mark.parametrize("key", ["teacher", "prompts.source", "trajectory.cache", "init"])
def test_a_run_goes_on_after_a_move_and_not_with_another_content(project: Path, key: str) -> None:
    before, after = project / "models" / "v1 #2", project / "moved"
    if key == "prompts.source":
        before, after = project / "list.txt", project / "moved.txt"
        before.write_text("a fox\na cat\n")
    run = project / "runs" / "mine"
    claim(run, f"{key}={before}")
    claim(run, f"{key}={before.relative_to(project)}")  # the same, by another path
    before.rename(after)
    claim(run, f"{key}={after}")
    assert f"{after}" in (run / "recipe.yaml").read_text()
    if after.is_dir():
        change(after)
    else:
        after.write_text("a dog\n")
    with pytest.raises(UserError, match=f"holds a run of another recipe \\({key}: the one it started with -> one of"):
        claim(run, f"{key}={after}")
    with pytest.raises(UserError, match=r"another recipe \(.*train.batch_size"):
        claim(run, f"{key}={before}", "train.batch_size=3")


def test_paths_in_stages_have_fingerprints(project: Path) -> None:
    (project / "list.txt").write_text("a fox\na cat\n")
    changed = load_recipe("micro-long", ["stages.0.prompts.source=list.txt", "teacher=models/v1 #2"])
    assert recipe_fingerprints(changed).keys() == {"teacher", "stages.0.prompts.source"}


def test_a_run_of_stages_is_moved(project: Path, tiny: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second stage starts from the first one's student, whose path changes; the last student is copied."""

    def distill(recipe: DistillRecipe, run: RunDir, *rest: object) -> Path:
        run.checkpoints.mkdir(exist_ok=True)
        (run.directory / "metrics.jsonl").write_text("")
        return save_student(tiny, str(run.directory / "student"), recipe.teacher)

    monkeypatch.setattr("fewstep.stages.distill", distill)
    recipe = load_recipe("micro-long", ["teacher=models/v1 #2"])
    assert isinstance(recipe, StagesRecipe)
    first, second = project / "runs" / "first", project / "second"

    def run(directory: Path) -> Path:
        with RunDir(directory, recipe, fingerprints=recipe_fingerprints(recipe)) as opened:
            return run_stages(recipe, opened)

    assert json.loads((run(first) / "fewstep.json").read_text())["teacher"] == "../../../models/v1 #2"
    first.rename(second)
    assert json.loads((run(second) / "fewstep.json").read_text())["teacher"] == "../../models/v1 #2"
    assert "second/stages" in (next((second / "stages").glob("2-*")) / "recipe.yaml").read_text()


def test_a_run_of_an_earlier_version_keeps_its_paths(project: Path) -> None:
    run = project / "runs" / "mine"
    claim(run, "teacher=models/v1 #2")
    (run / "fingerprints.json").unlink()
    with pytest.raises(UserError, match="another recipe"):
        claim(run, f"teacher={project}/models/v1 #2")
    RunDir(project / "runs" / "tiny", tiny_recipe()).close()
    assert not (project / "runs" / "tiny" / "fingerprints.json").exists()
