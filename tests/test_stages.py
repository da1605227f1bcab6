"""Recipes of several stages: each starts from the last student, and they share caches, memory and disk space."""

import json
import weakref

import pytest
import torch

from fewstep import api
from fewstep.config.load import recipe_model
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.methods.models_setup import build_models
from fewstep.models.pipeline import load


def recipe_tree(folder, steps=4):
    optim = {"student": {"lr": 3e-3}, "fake_score": {"lr": 1e-3}}
    train = {"steps": steps, "batch_size": 4, "log_every": 1, "save_every": 2}
    align = {
        "name": "align",
        "method": {"name": "trajectory"},
        "student": {"steps": 2},
        "trajectory": {"num_trajectories": 8, "teacher_steps_per_student_step": 3},
        "optim": {"student": optim["student"]},
        "train": {**train, "steps": 30},
    }
    method = {
        "name": "dmd",
        "terms": {"cfg_augmentation": {}, "distribution_matching": {}},
        "fake_score_updates": 1,
    }
    match = {"name": "match", "method": method, "student": {"steps": 1}, "optim": optim, "train": train}
    return {
        "kind": "stages", "name": "two", "teacher": str(folder), "stages": [align, match],
        "evaluate": {"enabled": False},
    }  # fmt: skip


def recipe_of(tree):
    return recipe_model("stages").model_validate(tree)


def test_stages_start_from_the_last_student_and_resume(tiny_folder, tmp_path):
    made = api.distill(recipe_of(recipe_tree(tiny_folder)), tmp_path / "run")
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "stages/1-align/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["student/loss"] < 0.7 * lines[0]["student/loss"]
    assert load(made.student).generation_config.steps == 1
    joined = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert joined == list(range(1, 35))
    aligned, student = load(run / "stages/1-align/student"), load(made.student)
    teacher = load(tiny_folder)

    def distance(a, b):
        pairs = zip(a.transformer.parameters(), b.transformer.parameters(), strict=True)
        return sum((x - y).abs().sum().item() for x, y in pairs)

    assert 0 < distance(student, aligned) < distance(student, teacher)
    before = generate(student, ["a dog"], SamplingParams(seed=3)).images
    api.distill(recipe_of(recipe_tree(tiny_folder)), tmp_path / "run")  # finished: nothing changes
    assert torch.equal(generate(load(made.student), ["a dog"], SamplingParams(seed=3)).images, before)


@pytest.mark.slow
def test_models_of_a_stage_are_freed_before_the_next(tiny_folder, tmp_path, monkeypatch):
    """The last student is a hard link: it takes its space once."""
    made, left = [], []

    def noted(*words, **more):
        left.append([model() is not None for references in made for model in references])
        models = build_models(*words, **more)
        made.append([weakref.ref(models.teacher.transformer), weakref.ref(models.student.denoiser)])
        return models

    monkeypatch.setattr("fewstep.jobs.build_models", noted)
    student = api.distill(recipe_of(recipe_tree(tiny_folder)), tmp_path / "run").student
    assert left == [[], [False] * 2]
    file = "transformer/diffusion_pytorch_model.safetensors"
    assert (student / file).samefile(tmp_path / "run/stages/2-match/student" / file)
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError))
    other = api.distill(recipe_of(recipe_tree(tiny_folder)), tmp_path / "run").student
    assert not (other / file).samefile(tmp_path / "run/stages/2-match/student" / file)


def test_stages_with_equal_trajectories_share_a_cache(tiny_folder, tmp_path):
    recipe = recipe_tree(tiny_folder)
    align, match = recipe["stages"]
    match |= {"student": align["student"], "trajectory": align["trajectory"]}
    match["method"] = match["method"] | {"terms": {"trajectory_mse": {}, "cfg_augmentation": {}}}
    match["optim"] = align["optim"]
    align["train"]["steps"] = 2
    api.distill(recipe_of(recipe), tmp_path / "run")
    assert [folder.name for folder in (tmp_path / "run" / "cache").iterdir()] == ["align"]
    assert not (tmp_path / "run/stages/2-match/cache").exists()


@pytest.mark.slow
def test_stages_with_other_prompts_have_their_own_cache(tiny_folder, tmp_path):
    recipe = recipe_tree(tiny_folder)
    align, match = recipe["stages"]
    (tmp_path / "prompts.txt").write_text("a fox\n")
    match |= {"student": align["student"], "trajectory": align["trajectory"]}
    match["method"] = match["method"] | {"terms": {"trajectory_mse": {}, "cfg_augmentation": {}}}
    match["optim"] = align["optim"]
    match["prompts"] = {"source": str(tmp_path / "prompts.txt")}
    align["train"]["steps"] = 2
    api.distill(recipe_of(recipe), tmp_path / "run")
    assert sorted(folder.name for folder in (tmp_path / "run" / "cache").iterdir()) == ["align", "match"]


def test_stage_without_an_optimizer_for_the_fake_score_is_refused(tiny_folder):
    recipe = recipe_tree(tiny_folder)
    del recipe["stages"][1]["optim"]["fake_score"]
    with pytest.raises(ValueError, match=r"optim\.fake_score is missing"):
        recipe_of(recipe)
