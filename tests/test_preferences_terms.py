"""The surrogate's and DPO's terms on Gaussians: losses, signs, groups without spread, gradients to the right part."""

import math

import pytest
import torch
from dmd_setup import COUNT, LEVELS, SHIFT, batch_of, dmd
from gaussian import Gaussian, prompts_of
from reward_setup import Linear, scorer_of

from fewstep.core import flow
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.terms.base import Renoised
from fewstep.methods.dmd.terms.dpo import DPO, DPOSettings
from fewstep.methods.dmd.terms.dpo_pairs import SampledPairs
from fewstep.methods.dmd.terms.surrogate import Surrogate, SurrogateSettings
from fewstep.methods.rl.dpo import best_and_worst, dpo_loss
from fewstep.methods.rl.surrogate import denoising_error, surrogate_loss

SIGMAS = flow.sigmas_from_timesteps(LEVELS, SHIFT)
REWARD = {"rewards": [{"reward": "x"}]}
OPTIONS = {"beta": 2.0, "clip": 0.5, "pull": 0.0}


# --- the surrogate's loss ---------------------------------------------------------------------------------------


def test_surrogate_loss_is_the_papers():
    error = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    reference, advantages = torch.tensor([1.1, 1.8, 3.0, 4.2]), torch.tensor([1.0, -1.0, 0.5, -0.5])
    loss = surrogate_loss(error, reference, error.detach(), advantages, 2, beta=2.0, clip=0.5, pull=0.1)
    loss.backward()
    weights = [1 / (1 + math.exp(-2.0 * s)) for s in ((-0.1 - 0.2) / 2, (0.0 + 0.1) / 2)]
    expected = [w * a for w, a in zip([weights[0]] * 2 + [weights[1]] * 2, advantages.tolist(), strict=True)]
    pulls = [0.2 * d for d in (error.detach() - reference).tolist()]
    assert error.grad.tolist() == pytest.approx([(e + p) / 4 for e, p in zip(expected, pulls, strict=True)], abs=1e-6)


def test_samples_that_moved_beyond_the_clip_have_no_gradient():
    """To the side of their advantage only: a lower error is a larger ratio."""
    error = torch.tensor([1.0, 1.0, 1.0, 1.0], requires_grad=True)
    recent = torch.tensor([2.0, 2.0, 0.0, 0.0])
    surrogate_loss(error, error.detach(), recent, torch.tensor([1.0, -1.0, 1.0, -1.0]), 4, **OPTIONS).backward()
    assert error.grad.tolist() == [0.0, -0.125, 0.125, 0.0]


def test_a_group_without_spread_leaves_the_surrogate_alone():
    error = torch.rand(4, requires_grad=True)
    surrogate_loss(error, torch.rand(4), error.detach(), torch.zeros(4), 4, **OPTIONS).backward()
    assert error.grad.tolist() == [0.0] * 4


def test_denoising_error_is_a_mean_over_elements():
    assert denoising_error(torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0)).tolist() == [9.0, 9.0]


def surrogate_term(slope, *, student=None, group_size=32, **options):
    settings = SurrogateSettings(**REWARD, **{"clip": 0.5, **options})
    return Surrogate(
        Gaussian().requires_grad_(False), student or Gaussian(), Gaussian(), scorer_of(Linear(slope)),
        Renoise("hybrid", SHIFT), SIGMAS, group_size, settings,
    )  # fmt: skip


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_the_surrogate_learns_the_preference_and_the_direction_follows_it(slope):
    """After training on groups its samples are better; the student's direction then has the sign of the reward's."""
    torch.manual_seed(0)
    term = surrogate_term(slope)
    optimizer = torch.optim.Adam(term.surrogate.parameters(), lr=0.02)
    for step in range(30):
        loss, metrics = term.compute_surrogate_loss(batch_of(count=64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        term.after_step(step)
    assert term.surrogate.offset.item() * slope > 0.05
    assert term.student.offset.grad is None
    assert metrics["advantage_abs"] > 0
    x0, sigma, prompts = torch.ones(4, 2, 2, 2), torch.full((4,), 0.7), prompts_of([1.0] * 4)
    noisy = flow.add_noise(x0, sigma, torch.randn_like(x0))
    teacher = flow.x0_from_velocity(noisy, sigma, term.teacher(noisy, sigma, prompts))
    with torch.no_grad():
        found = term.direction(x0, torch.ones(4), prompts, Renoised(noisy, sigma), [teacher])
    assert (found.delta * slope > 0).all()


def test_a_group_shares_its_noise_level_and_its_noise():
    term = surrogate_term(1.0, group_size=3)
    seen = []
    term.surrogate.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    term.student = Gaussian(deviation=1e-4)  # nearly equal samples: what differs within a group would be the noise
    term.compute_surrogate_loss(batch_of())
    x, sigma, _ = seen[0]
    assert sigma[:3].unique().numel() == sigma[3:].unique().numel() == 1
    assert sigma[0] != sigma[3]
    assert (x[:3] - x[:1]).abs().max() < 0.01 < (x[3] - x[0]).abs().max()


def test_the_moving_average_of_the_surrogate_is_restored():
    term = surrogate_term(1.0)
    with torch.no_grad():
        term.surrogate.offset.fill_(1.0)
    term.after_step(0)
    average = term.recent.weights["offset"].clone()
    assert average.item() == pytest.approx(0.1)
    other = surrogate_term(1.0)
    other.load_state_dict({name: value.clone() for name, value in term.state_dict().items()})
    assert torch.equal(other.recent.weights["offset"], average)


# --- DPO --------------------------------------------------------------------------------------------------------


def test_dpo_loss_is_log_2_at_the_reference_and_moves_both_sides():
    winner, loser = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    loss = dpo_loss(winner, loser, torch.zeros(1), torch.zeros(1), 3.0).sum()
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert winner.grad.item() == pytest.approx(-1.5)
    assert loser.grad.item() == pytest.approx(1.5)


def test_pairs_are_the_best_and_worst_of_each_group_that_differ():
    scores = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 5.01, math.nan, 1.0, 4.0, math.nan, math.nan, math.nan])
    best, worst, counted = best_and_worst(scores, 3, 0.1)
    assert counted.tolist() == [True, False, True, False]
    assert best[[0, 2]].tolist() == [1, 8]
    assert worst[[0, 2]].tolist() == [0, 7]


def dpo_term(slope, student, reference=None, group_size=COUNT):
    reference = reference or Gaussian().requires_grad_(False)
    pairs = SampledPairs(student, scorer_of(Linear(slope)), SIGMAS, 0.9, group_size, 0.1)
    return DPO(student, reference, pairs, DPOSettings(**REWARD, beta=5.0))


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_dpo_moves_probability_from_losers_to_winners(slope):
    torch.manual_seed(0)
    student = Gaussian()
    method = dmd(ca=0.0, dm=0.0, student=student, group_size=8, terms=[
        lambda sampler: ("dpo", dpo_term(slope, sampler.student, group_size=8), 1.0)
    ])  # fmt: skip
    optimizer, (part,) = torch.optim.SGD([student.offset], lr=0.2), method.trainables
    for _ in range(10):
        collected = method.collect(batch_of(count=64))
        loss, metrics = part.loss(collected)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["dpo_margin"] > 0  # the last pairs, by the student before its last update
    assert student.offset.item() * slope > 0.02


def test_pairs_of_equal_scores_give_no_gradient():
    student = Gaussian()
    term = dpo_term(0.0, student)
    term.loss(term.collect(batch_of())).backward()
    assert student.offset.grad.item() == 0.0
