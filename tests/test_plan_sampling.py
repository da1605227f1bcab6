"""Plans of what a run samples: the teacher's trajectories before the training, and the evaluation after it."""

import pytest
import torch
from memory import peak_bytes
from test_plan import TRAJECTORY, recipe_of
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.guidance import ClassifierFreeGuidance
from fewstep.models.pipeline import load
from fewstep.plan.costs import PROMPT_TOKENS
from fewstep.plan.estimate import EVALUATION, TRAJECTORIES, plan


def test_sampling_the_teacher_and_the_evaluation_are_planned(tiny_folder, monkeypatch):
    """Both sample the guided teacher, whose forwards take two copies of a batch."""
    monkeypatch.setattr("fewstep.plan.passes.DRAWS", 1)
    found = plan(recipe_of(tiny_folder, *TRAJECTORY, "evaluate.enabled=true"), device_type="cpu")
    sampled, evaluated = found.peaks[TRAJECTORIES], found.peaks[EVALUATION]
    assert sampled["teacher"] == found.peaks["loading the teacher"]["teacher"]
    assert evaluated["student"] == 4 * found.parameters == evaluated["teacher"]
    model = load(tiny_folder, "cpu")
    noise = torch.randn(64, *model.latent_shape(64, 64))
    features = torch.randn(64, PROMPT_TOKENS, model.transformer.config["cap_feat_dim"])
    prompts = EncodedPrompts(features, torch.full((64,), PROMPT_TOKENS))
    null = EncodedPrompts(features[:1], prompts.lengths[:1])
    guided = ClassifierFreeGuidance(model.denoiser, null, 4.0)
    with torch.no_grad():
        real = peak_bytes(lambda: guided(noise, torch.rand(64), prompts))
    assert sampled["sampling activations"] == pytest.approx(real, rel=0.1)


def test_trajectories_of_several_step_counts_take_the_memory_of_the_most(tiny_folder):
    """And the passes of the mean: 1, 1, 1, 1, 2, 2, 4 and 8 steps have 2.5."""
    alone = ("method={name: trajectory}", "optim.fake_score=null")
    several = "student={steps: 8, step_counts: [1, 1, 1, 1, 2, 2, 4, 8]}"
    found, most = (plan(recipe_of(tiny_folder, *alone, each)) for each in (several, "student={steps: 8}"))
    saved = [each.peaks["training step"]["saved activations"] for each in (found, most)]
    assert saved[0] == pytest.approx(saved[1], rel=1e-3)
    assert most.backwards == 8
    assert found.backwards == pytest.approx(2.5, abs=0.8)


def test_what_is_not_sampled_is_not_planned(tiny_folder, monkeypatch):
    monkeypatch.setattr("fewstep.plan.passes.DRAWS", 1)
    plain = plan(recipe_of(tiny_folder, "evaluate.enabled=false"))
    cached = plan(recipe_of(tiny_folder, *TRAJECTORY, "trajectory.cache=x", "evaluate.enabled=false"))
    assert not {TRAJECTORIES, EVALUATION} & (plain.peaks.keys() | cached.peaks.keys())


@pytest.mark.slow
def test_the_last_stage_is_planned_with_the_evaluation():
    done = CliRunner().invoke(app, ["plan", "micro-long", "--gpu", "24"])
    assert done.exit_code == 0, done.output
    assert done.output.count(EVALUATION) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["micro-long", "micro-ca", "micro-dm", "micro-dmd2", "micro-aligned", "micro-turbo"])
def test_every_kind_of_distillation_has_a_plan(name):
    """Trajectories, CA or DM alone, a GAN, a trajectory warm-up; a fake score only where it is trained."""
    done = CliRunner().invoke(app, ["plan", name, "--gpu", "rtx4090"])
    assert done.exit_code == 0, done.output
    assert "rtx4090 (24 GB): fits" in done.output
    for row in ("fake score weights", "fake score optimizer"):
        assert (row in done.output) == (name != "micro-ca")
