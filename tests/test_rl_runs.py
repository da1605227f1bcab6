"""Whole runs with rewards on a tiny model: exact resume, the same on one process and two, plans."""

import pytest
import torch
from rl_runs_setup import lines, run_processes
from safetensors.torch import load_file

from fewstep import api
from fewstep.config.load import load_recipe
from fewstep.errors import UserError
from fewstep.plan.estimate import plan

BRIGHT = "rewards: [{reward: 'python:rl_rewards:brightness'}]"
SHORT = [
    *("train.batch_size=4", "train.log_every=1", "train.save_every=1", "train.sample_every=0", "train.precision=fp32"),
    *("method.fake_score_updates=1", "method.fake_score_start=0", "evaluate.enabled=false", "train.on_alert=off"),
    *("student.steps=3", "evaluate.validate_every=0", "models.train=lora", "models.rank=2", "method.group_size=2"),
    *("optim.student={lr: 1.0e-2}", "optim.fake_score={lr: 1.0e-2}"),
]
TERMS = (
    "cfg_augmentation: {}, distribution_matching: {dyna_dg: {steps: 2}}, "
    f"reward: {{{BRIGHT}, balance: 1, balance_updates: 2}}, reward_tilt: {{{BRIGHT}}}, "
    f"reward_weighting: {{{BRIGHT}, weight: 0.2, score_every: 1}}, advantage_weighting: {{{BRIGHT}}}, "
    f"grpo: {{{BRIGHT}, updates: 2, kl_weight: 0.1}}"
)
ALL = [*SHORT, f"method.terms={{{TERMS}}}", "method.renoise.dyna_rs={steps: 3}"]


@pytest.mark.slow
def test_a_run_with_every_reward_term_resumes_exactly(tiny_folder, tmp_path):
    more = [f"teacher={tiny_folder}", *ALL]
    api.distill("micro-aligned", tmp_path / "whole", overrides=[*more, "train.steps=4"])
    api.distill("micro-aligned", tmp_path / "parts", overrides=[*more, "train.steps=4", "train.max_minutes=1.0e-6"])
    api.distill("micro-aligned", tmp_path / "parts", overrides=[*more, "train.steps=4"])
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "whole")] == [1, 2, 3, 4]
    logged = set(lines(tmp_path / "whole")[-1])
    assert logged >= {
        *("student/reward", "student/reward_factor", "student/score_python", "student/reward_tilt"),
        *("student/reward_weighting_spread", "student/advantage_weighting_spread", "student/grpo", "student/grpo_kl"),
    }
    recipe = load_recipe("micro-aligned", [*more, "train.steps=4"])
    known = recipe.method.metric_names(recipe)
    unknown = {name for name in logged if name.startswith("student/")} - known
    assert unknown <= {f"student/{name}" for name in ("loss", "grad_norm", "lr", "nonfinite_skips")}
    files = [sorted((tmp_path / run).glob("lora/*.safetensors")) for run in ("whole", "parts")]
    one, other = (load_file(each[0]) for each in files)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_two_processes_equal_one(tiny_folder, tmp_path):
    """Groups are whole on each, statistics and balance are those of both."""
    options = [f"teacher={tiny_folder}", *ALL, "train.steps=3"]
    one, two = (run_processes("micro-aligned", tmp_path, options, count) for count in (1, 2))
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            if "ratio" not in name and "x0_" not in name and "cosine" not in name:  # those are no means over samples
                assert second[name] == pytest.approx(value, abs=2e-4, rel=2e-3), name


@pytest.mark.slow
def test_a_plan_counts_the_rewards(tiny_folder):
    """HPSv2.1's two towers in fp32, and the activations of one image at a time; the passes of the rollouts."""
    more = [f"teacher={tiny_folder}", *SHORT, "train.batch_size=4"]
    plain = plan(load_recipe("micro-aligned", [*more, "method.terms={distribution_matching: {}}"]))
    found = {}
    for micro_batch in (1, 4):
        reward = f"reward: {{rewards: [{{reward: 'hpsv2:models/none'}}], micro_batch: {micro_batch}}}"
        found[micro_batch] = plan(
            load_recipe("micro-aligned", [*more, f"method.terms={{distribution_matching: {{}}, {reward}}}"])
        )
    assert "rewards" not in plain.memory
    assert found[1].memory["rewards"] == 4 * 986_109_441
    assert found[1].total > plain.total + 4e9
    assert found[4].total > found[1].total + 1e8
    # the endpoint's rollout: three steps, the last with gradient
    assert found[1].forwards - plain.forwards == pytest.approx(3)
    assert found[1].backwards - plain.backwards == pytest.approx(1)


def test_a_reward_without_gradient_is_refused_where_one_is_needed(tiny_folder, tmp_path):
    terms = "distribution_matching: {}, reward: {rewards: [{reward: 'python:builtins:len'}]}"
    overrides = [f"teacher={tiny_folder}", *SHORT, f"method.terms={{{terms}}}", "train.steps=1"]
    with pytest.raises(UserError, match=r"python:builtins:len has no gradient; use it in reward_weighting, grpo"):
        api.distill("micro-aligned", tmp_path / "run", overrides=overrides)
