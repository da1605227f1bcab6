"""ReFL beside DMD where the optimum is known: equilibria, gradients, balance, failures."""

from itertools import pairwise

import pytest
import torch
from dmd_setup import LEVELS, SHIFT, batch_of, dmd
from gaussian import SHAPE, Gaussian, prompts_of
from reward_setup import Failing, Linear, Quadratic, scorer_of

from fewstep.core import flow
from fewstep.core.schedules import Constant
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.method import WeightedTerm
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.terms.reward import Reward
from fewstep.methods.rl.balance import Balance, gradient_norm
from fewstep.methods.rl.refl import Goal, output_gradient, shortfall, with_output_gradient

TEACHER_MEAN = 1.0  # of the prompts that batch_of gives


def reward_term(reward, *, on="endpoint", goal=Goal(1.0), balance=None, weight=1.0):  # noqa: B008  # a named tuple
    """A function of the sampler, as `dmd` takes it."""

    def make(sampler):
        term = Reward(scorer_of(reward), {"r0": goal}, sampler.endpoint if on == "endpoint" else None, balance)
        return "reward", term, weight

    return make


# --- pure functions ------------------------------------------------------------------------------------------------


def test_shortfall_is_the_sum_of_hinges():
    scores = {"a": torch.tensor([0.2, 0.9]), "b": torch.tensor([2.0, 4.0])}
    found = shortfall(scores, {"a": Goal(0.3, 0.7), "b": Goal(0.5)})
    torch.testing.assert_close(found, torch.tensor([0.3 * 0.5 - 0.5 * 2, -0.5 * 4.0]))


def test_a_sample_without_a_score_has_no_loss_and_no_gradient():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    scores = torch.where(torch.tensor([False, True]), torch.nan, x)
    found = shortfall({"a": scores}, {"a": Goal(2.0)})
    found.sum().backward()
    assert found.tolist() == [-2.0, 0.0]
    assert x.grad.tolist() == [-2.0, 0.0]


def test_the_gradient_at_the_output_is_that_of_the_whole_graph():
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(3, 4)

    def loss(output):
        return (output.sin() * torch.arange(4)).square().mean()

    loss(x @ weight).backward()
    expected, weight.grad = weight.grad, None
    output = x @ weight
    value, gradient = output_gradient(loss, output)
    joined = with_output_gradient(output, value, gradient)
    joined.backward()
    assert joined.item() == pytest.approx(loss(x @ weight).item())
    torch.testing.assert_close(weight.grad, expected)


# --- with distribution matching ------------------------------------------------------------------------------------


def dm_strength(renoise, deviation=0.5):
    """E[1 - (1 - sigma) k(sigma)] over the renoise schedule: the share of the means' distance in x0_T - x0_F."""
    sigma = renoise.sigma((torch.arange(200_000) + 0.5) / 200_000)
    return (1 - (1 - sigma) * Gaussian(deviation).shrink(sigma)).mean().item()


@pytest.mark.parametrize("on", ["endpoint", "anchor"])
@pytest.mark.parametrize("weight", [0.03, 0.3])
def test_refl_with_dm_lands_between_teacher_and_reward_at_the_predicted_point(on, weight):
    """With a constant normalizer n the gradients cancel at (C m_T + w g) / (C + w), C = dm_strength / n."""
    eps, goal = 10.0, -3.0  # so large that every normalizer is clamped to it
    renoise = Renoise("hybrid", SHIFT)
    student, fake = Gaussian(offset=0.5), Gaussian()
    method = dmd(
        ca=0.0, student=student, fake=fake, renoise=renoise, levels=(1.0,), eps=eps, ema_to_student=1.0,
        terms=[reward_term(Quadratic(goal), on=on, weight=weight)],
    )  # fmt: skip
    optimizer = torch.optim.SGD([student.offset], lr=4.0)
    seen = []
    for step in range(150):
        method.after_step(step)  # the fake score is the student's own
        loss, _ = method.compute_student_loss(batch_of(count=64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(student.offset.item())
    strength = dm_strength(renoise) / eps
    expected = (strength * TEACHER_MEAN + weight * goal) / (strength + weight)
    assert goal < expected < TEACHER_MEAN
    assert TEACHER_MEAN + sum(seen[50:]) / 100 == pytest.approx(expected, abs=0.05)


def test_the_endpoint_is_that_of_the_rollout_with_gradient_through_its_last_step():
    """Four steps: its value is the sampler's, its gradient that of the last prediction from a constant input."""
    student = Gaussian(offset=0.3)
    method = dmd(ca=0.0, dm=0.0, student=student, terms=[reward_term(Linear())])
    batch = batch_of()
    loss, metrics = method.compute_student_loss(batch)
    loss.backward()

    sigmas = method.sampler.sigmas
    with torch.no_grad():
        x = batch.noise
        for sigma, following in pairwise(sigmas):
            x = x + (following - sigma) * student(x, torch.full((len(x),), sigma), batch.prompts)
    assert -loss.item() == pytest.approx(x.mean().item(), abs=1e-5)
    last = torch.tensor(sigmas[-2])
    slope = 1 - (1 - last) * student.shrink(last)  # d x0 / d offset, in the mean over elements and samples
    assert student.offset.grad.item() == pytest.approx(-slope.item(), rel=1e-4)
    assert metrics["score_r0"].item() == pytest.approx(x.mean().item(), abs=1e-5)


def test_an_anchor_reward_scores_the_prediction_that_dm_uses():
    method = dmd(ca=0.0, terms=[reward_term(Linear(), on="anchor")])
    torch.manual_seed(1)
    _, metrics = method.compute_student_loss(batch_of())
    assert metrics["score_r0"].item() == pytest.approx(metrics["x0_mean"].item(), abs=1e-6)
    assert len(method.sampler.student.calls) <= len(LEVELS)  # one rollout


@pytest.mark.parametrize("on", ["endpoint", "anchor"])
def test_gradients_reach_the_student_alone(on):
    teacher, student, fake = Gaussian(), Gaussian(), Gaussian()
    method = dmd(teacher=teacher, student=student, fake=fake, terms=[reward_term(Quadratic(2.0), on=on)])
    method.compute_student_loss(batch_of())[0].backward()
    assert student.offset.grad.abs() > 0
    assert teacher.offset.grad is fake.offset.grad is None


def test_the_reward_is_given_the_prompts_texts():
    reward = Quadratic(0.0)
    method = dmd(ca=0.0, dm=0.0, terms=[reward_term(reward)])
    batch = batch_of()
    method.compute_student_loss(DistillBatch(batch.noise, batch.prompts, texts=list("abcdef")))
    assert reward.prompts == [list("abcdef")]


def test_a_failed_score_leaves_the_others_their_gradients():
    method = dmd(ca=0.0, dm=0.0, terms=[reward_term(Failing())])
    batch = batch_of()
    student = method.sampler.student
    method.compute_student_loss(DistillBatch(batch.noise, batch.prompts, texts=["bad", *"abcde"]))[0].backward()
    partial, student.offset.grad = student.offset.grad, None
    _, metrics = method.compute_student_loss(DistillBatch(batch.noise, batch.prompts, texts=list("abcdef")))
    loss, _ = method.compute_student_loss(DistillBatch(batch.noise, batch.prompts, texts=list("abcdef")))
    loss.backward()
    assert partial.item() == pytest.approx(5 / 6 * student.offset.grad.item(), rel=1e-5)
    assert metrics["unscored_r0"].item() == 0


# --- balance ----------------------------------------------------------------------------------------------------


def test_gradient_norm_does_not_depend_on_the_batch_size():
    x = torch.randn(1, *SHAPE)
    norms = [gradient_norm(x.repeat(count, 1, 1, 1) / count).item() for count in (1, 5)]
    assert norms == pytest.approx([x.norm().item()] * 2)


@pytest.mark.parametrize("on", ["endpoint", "anchor"])
@pytest.mark.parametrize("slope", [1e-3, 1e3])
def test_balance_brings_the_reward_to_its_ratio_of_the_directions(on, slope):
    """Whatever the reward's scale: the scaled gradient's norm is half that of the pseudo-target loss."""
    balance = Balance(0.5, updates=4)
    method = dmd(fake=Gaussian(offset=1.0), eps=0.1, terms=[reward_term(Linear(slope), on=on, balance=balance)])
    term = method.terms["reward"].term
    reference, scaled = [], []
    measure = balance.measure

    def record(gradient, direction):
        reference.append(gradient_norm(direction).item())
        scaled.append(gradient_norm(gradient).item())
        measure(gradient, direction)

    balance.measure = record
    for _ in range(6):
        _, metrics = method.compute_student_loss(batch_of())
    expected = 0.5 * sum(reference[:4]) / sum(scaled[:4])
    assert metrics["reward_factor"].item() == pytest.approx(expected, rel=1e-5)
    assert balance.measured == 4  # then it is fixed

    restored = Reward(term.scorer, term.goals, term.endpoint, Balance(0.5, updates=4))
    restored.load_state_dict(term.state_dict())
    assert restored.balance.factor == balance.factor
    assert restored.balance.measured == 4


def test_the_reference_norm_is_that_of_the_pseudo_target_loss():
    """The gradient that reaches x0, by autograd, against the direction over the number of elements."""
    method = dmd(fake=Gaussian(offset=1.0), eps=0.1)
    kept = []
    sampler = method.sampler

    def sample(batch):
        found = type(sampler).__call__(sampler, batch)
        found.x0.retain_grad()
        kept.append(found.x0)
        return found

    sample.student = sampler.student
    method.sampler = sample
    seen = []

    class Recorder(Reward):
        def __init__(self):
            super().__init__(scorer_of(Linear(0.0)), {"r0": Goal(1.0)}, None)

        def loss(self, sample, batch):
            seen.append(sample.direction)
            return sample.x0.sum() * 0

    method.terms["reward"] = WeightedTerm(Recorder(), Constant(1.0))
    method.compute_student_loss(batch_of())[0].backward()
    torch.testing.assert_close(kept[0].grad, -seen[0] / seen[0].numel())


def test_where_every_score_has_reached_its_margin_nothing_is_measured():
    balance = Balance(1.0, updates=2)
    method = dmd(terms=[reward_term(Linear(), goal=Goal(1.0, margin=-100.0), balance=balance)])
    loss, metrics = method.compute_student_loss(batch_of())
    assert (balance.measured, balance.factor) == (0, 1.0)
    assert metrics["reward"].item() == 0.0
    assert loss.isfinite()


def test_the_scores_of_a_rollout_are_at_sigma_0():
    """`endpoint` ends at the last level; the student's own levels are used, whatever is drawn for training."""
    method = dmd(ca=0.0, dm=0.0, terms=[reward_term(Linear())])
    method.compute_student_loss(DistillBatch(torch.randn(2, *SHAPE), prompts_of([1.0, 1.0]), texts=["", ""]))
    levels = [sigma[0].item() for _, sigma in method.sampler.student.calls]
    assert levels == pytest.approx([flow.shift_sigma(u, SHIFT) for u in LEVELS])
