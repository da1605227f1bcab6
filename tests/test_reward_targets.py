"""On-policy reward targets on Gaussians with a quadratic reward: the step, where it ends, what the policies do."""

import pytest
import torch
from dmd_setup import LEVELS, SHIFT, batch_of, dmd, train_student
from gaussian import SHAPE, Gaussian
from reward_setup import Linear, Quadratic, scorer_of

from fewstep.core import flow
from fewstep.methods.dmd.terms.reward_targets import RewardTargets, RewardTargetsSettings
from fewstep.methods.rl.refl import Goal
from fewstep.methods.rl.targets import bounded_step, target_loss

SIGMAS = flow.sigmas_from_timesteps(LEVELS, SHIFT)


def term_of(reward, student, margin=None, **options):
    settings = RewardTargetsSettings(rewards=[{"reward": "x"}], **options)
    return RewardTargets(student, scorer_of(reward, normalize=False), {"r0": Goal(1.0, margin)}, SIGMAS, settings)


def test_the_step_has_its_length_and_the_gradients_direction_at_any_scale():
    x0, gradient = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    gradient[2] = 0.0
    for scale in (1e-12, 1.0, 1e6):
        step = bounded_step(x0, scale * gradient, 0.1)
        lengths = step.flatten(1).norm(dim=1)
        torch.testing.assert_close(lengths[:2], 0.1 * x0.flatten(1).norm(dim=1)[:2])
        assert lengths[2] == 0
        cosine = torch.nn.functional.cosine_similarity(step.flatten(1), gradient.flatten(1))
        torch.testing.assert_close(cosine[:2], torch.ones(2))


def test_the_loss_is_least_one_step_over_beta_away():
    old, step = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    x0 = (old + step / 2.0).requires_grad_()
    loss = target_loss(x0, old, step, 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-10)
    torch.testing.assert_close(x0.grad, torch.zeros_like(x0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_both_of_the_papers_branches_are_this_loss_with_any_weight(beta):
    """The fits of the implicit better and worse predictions to the steps up and down."""
    x0, old, step = torch.randn(3, 1, *SHAPE).unbind()
    for weight in (0.1, 0.5, 0.9):
        better = (beta * x0 + (1 - beta) * old - (old + step)).square().mean()
        worse = ((1 + beta) * old - beta * x0 - (old - step)).square().mean()
        torch.testing.assert_close(weight * better + (1 - weight) * worse, target_loss(x0, old, step, beta))


def train(term, steps, lr=0.05, count=32):
    optimizer = torch.optim.Adam([term.student.offset], lr=lr)
    for step in range(steps):
        collected = term.collect(batch_of(count=count))
        for _ in range(term.updates):
            optimizer.zero_grad()
            term.loss(collected).backward()
            optimizer.step()
        term.after_step(step)


@pytest.mark.parametrize("goal", [0.0, 2.0])
def test_alone_it_ends_at_the_rewards_optimum(goal):
    """Within the length of a step, which is bounded but does not fall; the prompts' mean is 1."""
    torch.manual_seed(0)
    student = Gaussian(deviation=0.1)
    train(term_of(Quadratic(goal), student, radius=0.05, behavior_ema=0.5), 80)
    assert 1.0 + student.offset.item() == pytest.approx(goal, abs=0.15)


def test_one_rollout_moves_the_student_no_further_than_its_targets():
    """However many updates are made of it, and however steep the reward is."""
    student = Gaussian(deviation=0.0, offset=0.0)
    term = term_of(Linear(1e6), student, radius=0.1, updates=200)
    train(term, 1, lr=0.02)
    assert student.offset.item() == pytest.approx(0.1, abs=0.01)  # a tenth of the prompts' mean


def test_a_score_beyond_its_margin_gives_no_step():
    term = term_of(Quadratic(5.0), Gaussian(), margin=-100.0)
    collected = term.collect(batch_of())
    assert collected.step.abs().max() == 0


def test_targets_are_the_behavior_policys_and_detached():
    student = Gaussian()
    term = term_of(Quadratic(3.0), student)
    torch.manual_seed(1)
    before = term.collect(batch_of())
    with torch.no_grad():
        student.offset.fill_(1.0)
    torch.manual_seed(1)
    after = term.collect(batch_of())
    torch.testing.assert_close(after.old, before.old)  # the average has not moved yet
    assert student.offset.item() == 1.0
    assert not any(each.requires_grad for each in (after.z, after.old, after.step))
    term.after_step(0)
    assert term.behavior.weights["offset"].item() == pytest.approx(0.1)
    other = term_of(Quadratic(3.0), Gaussian())
    other.load_state_dict({name: value.clone() for name, value in term.state_dict().items()})
    assert torch.equal(other.behavior.weights["offset"], term.behavior.weights["offset"])


def test_with_dm_it_lands_between_teacher_and_goal_and_gradients_reach_the_student_alone():
    torch.manual_seed(0)
    teacher, student, fake = Gaussian(), Gaussian(), Gaussian()
    method = dmd(
        ca=0.0, teacher=teacher, student=student, fake=fake, eps=10.0, ema_to_student=1.0,
        terms=[lambda sampler: ("reward_targets", term_of(Quadratic(3.0), sampler.student), 0.3)],
    )  # fmt: skip
    metrics = train_student(method, student)
    assert {"reward_targets", "target_step", "target_drift", "score_r0", "dm_abs"} <= metrics.keys()
    assert teacher.offset.grad is fake.offset.grad is None
    assert 0.1 < student.offset.item() < 1.9
