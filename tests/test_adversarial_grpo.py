"""GRPO with a discriminator as the reward: what it moves, when, and what it leaves alone."""

from itertools import pairwise

import pytest
import torch
from dmd_setup import LEVELS, SHIFT, batch_of, dmd
from gaussian import SHAPE, Gaussian, prompts_of
from torch import nn

from fewstep.config.load import load_recipe
from fewstep.core import flow
from fewstep.core.denoiser import predict_x0
from fewstep.core.schedules import Constant, Piecewise
from fewstep.errors import UserError
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.terms.adversarial_grpo import AdversarialGRPO, AdversarialGRPOSettings
from fewstep.methods.dmd.terms.adversarial_surrogate import AdversarialSurrogate, AdversarialSurrogateSettings
from fewstep.methods.dmd.terms.adversary import Adversary, AdversarySettings
from fewstep.methods.dmd.terms.base import Renoised
from fewstep.methods.dmd.terms.policy import stochastic_rollout
from fewstep.methods.rl.groups import drop_flat_groups

SIGMAS = flow.sigmas_from_timesteps(LEVELS, SHIFT)


class Pixels:
    def features(self, x, sigma, prompts, depths):
        return x.flatten(2).transpose(1, 2)


class Mean(nn.Module):
    """A discriminator whose logits are the pixels' mean times a slope."""

    def __init__(self, slope=1.0):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, features, sigma):
        return self.slope * features.mean(dim=-1)[:, None]


def term_of(student, slope=1.0, open_steps=(0, 1, 2, 3), group_size=32, every=None, **options):
    settings = AdversarialGRPOSettings(adversary=AdversarySettings(), **options)
    simulate = lambda batch: stochastic_rollout(student, batch, SIGMAS, settings.eta)  # noqa: E731
    adversary = Adversary(Pixels(), Mean(slope), simulate, SIGMAS, settings.adversary)
    for step in open_steps:
        adversary.gate.add(torch.full((40,), step), torch.ones(40), torch.zeros(40))
    adversary.gate.update(0)
    return AdversarialGRPO(student, adversary, SIGMAS, group_size, settings, every or Constant(1.0))


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_the_update_goes_where_the_discriminator_scores_higher(slope):
    torch.manual_seed(0)
    student = Gaussian()
    term = term_of(student, slope, group_size=256, trained_steps=3)
    for _ in range(4):
        term.loss(term.collect(batch_of(count=256))).backward()
    assert student.offset.grad.item() * slope < -0.02
    assert term.adversary.heads.slope.grad is None
    assert term.metrics()["adversarial_grpo_open"].item() == 1.0


def test_a_closed_gate_makes_no_rollout_and_draws_nothing():
    student = Gaussian()
    term = term_of(student, open_steps=())
    batch = batch_of(count=32)
    state = torch.get_rng_state()
    loss = term.loss(term.collect(batch))
    assert torch.equal(state, torch.get_rng_state())
    assert loss.item() == 0.0
    assert not loss.requires_grad
    assert student.calls == []


def trained(policy, steps=4):
    """The student's offset after a few updates with DM and, maybe, the policy term."""
    torch.manual_seed(0)
    student = Gaussian()
    terms = [lambda sampler: ("adversarial_grpo", policy(sampler.student), 1.0)] if policy else []
    method = dmd(ca=0.0, student=student, teacher=Gaussian(offset=1.0).requires_grad_(False), terms=terms, group_size=2)
    (part,) = [part for part in method.trainables if part.name == "student"]
    optimizer = torch.optim.Adam([student.offset], lr=0.05, betas=(0.0, 0.99))
    for step in range(steps):
        method.before_step(step)
        batch = batch_of(count=32)
        with torch.no_grad():
            given = method.collect(batch) if policy else batch
        optimizer.zero_grad()
        part.loss(given)[0].backward()
        optimizer.step()
        method.after_step(step + 1)
    return student.offset.item()


def test_a_stopped_policy_leaves_no_trace():
    """Bit for bit the updates of a training without the term, though the discriminator sees everything again."""

    def stopped(student):
        term = term_of(student, group_size=2)
        term.adversary.gate.closed_for = term.adversary.gate.patience
        return term

    assert trained(stopped) == trained(None)
    assert trained(lambda student: term_of(student, group_size=2)) != trained(None)


def test_an_advantage_is_that_of_all_later_states_that_may_be_rewarded():
    term = term_of(Gaussian(), group_size=2, std_floor=1e-3, least_spread=0.0)
    scores = torch.tensor([[9.0, 0.0], [0.0, 4.0], [1.0, 0.0], [2.0, 1.0]])
    # mean of the states from index 2 on: 1.5 against 0.5, of deviation 0.5
    torch.testing.assert_close(term._advantages(scores, [True] * 4, 2), torch.tensor([1.0, -1.0]))
    # the last state alone: the same order; with the second one alone the other sample is better
    torch.testing.assert_close(term._advantages(scores, [False, False, False, True], 0), torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(term._advantages(scores, [False, True, False, False], 1), torch.tensor([-1.0, 1.0]))


def test_steps_without_a_later_state_to_be_rewarded_are_not_trained():
    torch.manual_seed(0)
    term = term_of(Gaussian(), open_steps=(1,), trained_steps=3)
    for _ in range(5):
        assert [step.index for step in term.collect(batch_of(count=32)).steps] == [0, 1]


def test_groups_without_spread_are_dropped():
    scores = torch.tensor([0.0, 0.05, 1.0, 3.0])
    found = drop_flat_groups(scores, 2, 0.1)
    assert found[:2].isnan().all()
    assert found[2:].tolist() == [1.0, 3.0]
    term = term_of(Gaussian(), group_size=2, std_floor=1e-3)
    # without the flat group the deviation is that of 1 and 3: their advantages are exactly 1
    advantages = term._advantages(scores[None].expand(4, -1), [True] * 4, 3)
    torch.testing.assert_close(advantages, torch.tensor([0.0, 0.0, -1.0, 1.0]))


def test_blind_scores_do_not_become_full_updates():
    """The deviation has a floor: differences of a hundredth give advantages of a tenth."""
    term = term_of(Gaussian(), group_size=2, least_spread=0.0)
    scores = torch.tensor([0.0, 0.02]).expand(4, -1)
    assert term._advantages(scores, [True] * 4, 0).abs().max().item() == pytest.approx(0.1, rel=1e-4)


def test_the_policys_turns_come_more_often_after_the_gate_opened():
    term = term_of(Gaussian(), every=Piecewise({0: 4.0, 8: 2.0}))
    term.adversary.gate.opened_at = 3
    due = []
    for step in range(3, 20):
        term.before_step(step)
        due += [step] if term.due else []
    assert due == [3, 7, 11, 13, 15, 17, 19]
    assert {later - first for first, later in pairwise(due)} == {4, 2}


def surrogate_term(open_steps=(0, 1, 2, 3)):
    policy = term_of(Gaussian(), open_steps=open_steps)
    settings = AdversarialSurrogateSettings(std_floor=0.1, clip=0.9)
    models = Gaussian().requires_grad_(False), Gaussian()
    return AdversarialSurrogate(*models, policy.adversary, Renoise("hybrid", SHIFT), 32, settings, eps=1e-6)


def test_the_surrogate_learns_what_the_discriminator_prefers():
    torch.manual_seed(0)
    term = surrogate_term()
    surrogate, _ = term.trainables()
    optimizer = torch.optim.Adam(term.surrogate.parameters(), lr=0.02)
    for _ in range(20):
        loss, metrics = surrogate.loss(batch_of(count=64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert term.surrogate.offset.item() > 0.05
    assert metrics["open"].item() == 1.0
    assert term.adversary.heads.slope.grad is None


@pytest.mark.parametrize("stopped", [False, True])
def test_the_surrogates_direction_ends_with_the_gate(stopped):
    term = surrogate_term()
    with torch.no_grad():
        term.surrogate.offset.fill_(1.0)
    term.adversary.gate.closed_for = term.adversary.gate.patience if stopped else 0
    x, sigma = torch.randn(4, *SHAPE), torch.full((4,), 0.5)
    prompts = prompts_of([0.0] * 4)
    teacher = [predict_x0(term.teacher, x, sigma, prompts)]
    with torch.no_grad():
        delta = term.direction(x, sigma, prompts, Renoised(x, sigma), teacher).delta
        advantages = term.preferences(batch_of(count=64))[1]
    assert bool((delta == 0).all()) == stopped
    assert bool((advantages == 0).all()) == stopped


TERMS = "method.terms={cfg_augmentation: {}, distribution_matching: {}, adversarial_grpo: {OPTIONS}}"


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ("every: 0.5", [], "at most one policy step"),
        ("adversary: {depths: [0.5, 0.25]}", [], "ascending"),
        ("adversary: {least_pairs: 200}", [], "never open"),
        ("adversary: {pretraining: 100%}", [], "not below train.steps"),
        ("trained_steps: 4", [], "3 stochastic ones"),
        ("", ["method.group_size=1"], "set method.group_size to 2"),
        ("", ["method.terms.gan={}"], "each train a discriminator"),
        ("", ["method.terms.distribution_matching=null", "optim.fake_score=null"], "nothing keeps the student"),
        ("", ["method.terms.mmd={}"], "real latent of each sample's own"),
    ],
)
def test_what_does_not_fit_is_refused(options, more, message):
    with pytest.raises(UserError, match=message):
        load_recipe("micro-advdmd-4", [TERMS.replace("OPTIONS", options), *more])
