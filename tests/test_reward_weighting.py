"""Weights of samples by reward: formulas, groups, the direction of the expected update."""

import math

import pytest
import torch
from dmd_setup import COUNT, batch_of, dmd
from gaussian import SHAPE, Gaussian, prompts_of
from reward_setup import Failing, Linear, Quadratic, scorer_of

from fewstep.config.load import load_recipe
from fewstep.core.method import Shard
from fewstep.data.batch import DistillBatch
from fewstep.errors import UserError
from fewstep.methods.dmd.data import check_whole_groups
from fewstep.methods.dmd.terms.advantage_weighting import AdvantageWeighting
from fewstep.methods.dmd.terms.base import StudentSample
from fewstep.methods.dmd.terms.reward_weighting import RewardWeighting
from fewstep.methods.rl.groups import group_advantages
from fewstep.methods.rl.weighting import advantage_weight, reward_weight

# --- pure functions ---------------------------------------------------------------------------------------------


def test_reward_weight_is_clipped_and_ramped_and_1_without_a_score():
    z = torch.tensor([-3.0, 0.0, 0.1, 3.0, math.nan])
    expected = torch.tensor([0.9, 1.0, math.exp(0.1), 1.15, 1.0])
    torch.testing.assert_close(reward_weight(z, 1.0, 1.0, 0.9, 1.15), expected)
    torch.testing.assert_close(reward_weight(z, 0.25, 1.0, 0.9, 1.15), 0.75 + 0.25 * expected)
    assert torch.equal(reward_weight(z, 0.0, 1.0, 0.9, 1.15), torch.ones(5))


def test_advantages_are_less_the_groups_mean_over_the_deviation_of_all():
    scores = torch.tensor([1.0, 3.0, 10.0, 12.0])
    found = group_advantages(scores, 2, floor=1e-3)
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, -1.0, 1.0]) / scores.std(correction=0))


def test_a_group_without_spread_has_no_advantage_whatever_the_others():
    found = group_advantages(torch.tensor([0.3, 0.3, 0.3, 1.0, 2.0, 3.0]), 3, floor=1e-3)
    assert found[:3].tolist() == [0.0, 0.0, 0.0]
    assert found[3] < 0 < found[5]


def test_noise_in_all_scores_is_not_blown_up():
    """Scores that differ by rounding alone: the floor divides, not their deviation."""
    scores = 1 + 1e-6 * torch.randn(8)
    assert group_advantages(scores, 4, floor=0.1).abs().max() < 1e-4


def test_advantages_are_bounded_and_failed_samples_have_none():
    scores = torch.tensor([0.0] * 99 + [100.0])
    assert group_advantages(scores, 100, floor=1e-3).max().item() == 5.0
    found = group_advantages(torch.tensor([1.0, 3.0, math.nan, math.nan, math.nan, math.nan]), 3, floor=1e-3)
    assert found.tolist() == pytest.approx([-1.0, 1.0, 0.0, 0.0, 0.0, 0.0])


def test_two_processes_have_the_advantages_of_one():
    """Whole groups on each; the deviation is summed over both."""
    scores = torch.randn(12) + torch.arange(12) // 4
    kept = []

    def record(tensor):
        kept.append(tensor)
        return tensor

    halves = [scores[:6], scores[6:]]
    for half in halves:
        group_advantages(half, 3, floor=1e-3, reduce=record)
    both = torch.cat([group_advantages(half, 3, floor=1e-3, reduce=lambda _: kept[0] + kept[1]) for half in halves])
    torch.testing.assert_close(both, group_advantages(scores, 3, floor=1e-3))


def test_an_advantage_turns_no_direction_around():
    assert advantage_weight(torch.tensor([-5.0, 0.0, 2.0]), 0.5).tolist() == [0.0, 1.0, 2.0]


# --- groups -----------------------------------------------------------------------------------------------------


def test_groups_have_one_prompt_and_their_own_noise():
    batch = DistillBatch(torch.randn(6, *SHAPE), prompts_of([1.0, 2, 3, 4, 5, 6]), texts=list("abcdef"))
    groups = batch.grouped(3)
    assert list(groups.texts) == list("aaaddd")
    assert groups.prompts.features.flatten().tolist() == [1.0] * 3 + [4.0] * 3
    assert groups.noise is batch.noise
    parts = [Shard(rank, 2).rows(6) for rank in range(2)]
    own = [DistillBatch(batch.noise[rows], batch.prompts[rows], texts=batch.texts[rows]).grouped(3) for rows in parts]
    assert [*own[0].texts, *own[1].texts] == list(groups.texts)


def test_groups_are_never_divided():
    check_whole_groups(12, 3, 2)
    with pytest.raises(UserError, match=r"no whole groups; set train\.batch_size to a multiple of 8"):
        check_whole_groups(12, 4, 2)


GROUPED = (
    "method.terms={cfg_augmentation: {}, distribution_matching: {}, advantage_weighting: {rewards: [{reward: x}]}}"
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([GROUPED], r"advantage_weighting compares samples of one prompt: set method\.group_size"),
        ([GROUPED, "method.group_size=5"], r"train\.batch_size 32 is not a multiple of method\.group_size 5"),
        (["method.group_size=4"], "trajectory_mse needs a real latent of each sample's own"),
        (
            ["method.terms={reward_weighting: {rewards: [{reward: x}]}}", "optim.fake_score=null"],
            "the student would not be trained",
        ),
        (["method.terms.reward_weighting={rewards: [{reward: x}], weight: 2}"], "it is a share, at most 1"),
        (["method.terms.reward_weighting={rewards: []}"], "rewards"),
    ],
)
def test_recipes_that_cannot_be_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        load_recipe("micro-aligned", ["method.fake_score_start=0", *overrides])


# --- in the objective -------------------------------------------------------------------------------------------


def weighting(reward, share=1.0, **options):
    return lambda sampler: ("reward_weighting", RewardWeighting(scorer_of(reward), **options), share)


def sample_of(x):
    """A student sample of which x0 alone is used."""
    return StudentSample(x, x, torch.ones(len(x)), torch.ones(len(x)), prompts_of([1.0] * len(x)))


def gradient_of(method, batch, seed=3):
    method.sampler.student.offset.grad = None
    torch.manual_seed(seed)
    loss, metrics = method.compute_student_loss(batch)
    loss.backward()
    return method.sampler.student.offset.grad.item(), metrics


def test_statistics_are_those_before_the_batch():
    """The same batch scores differently after another one; a batch does not normalize itself."""
    term = RewardWeighting(scorer_of(Linear()), low=0.0, high=10.0)
    for mean in (0.0, 0.5):
        x = mean + torch.tensor([-1.0, 1.0]).repeat(COUNT // 2)
        found = term.sample_weights(1.0, sample_of(x[:, None, None, None].expand(-1, *SHAPE)), batch_of())
    torch.testing.assert_close(found, torch.tensor([-0.5, 1.5]).exp().repeat(COUNT // 2))


def test_only_every_fourth_step_is_scored():
    reward = Linear()
    scored = []
    term = RewardWeighting(scorer_of(reward))
    term.scorer.decode = lambda latents: scored.append(term.step) or latents
    method = dmd(terms=[lambda sampler: ("reward_weighting", term, 1.0)])
    for step in range(9):
        method.before_step(step)
        metrics = method.compute_student_loss(batch_of())[1]
        assert (metrics["reward_weighting_spread"].item() > 0) == (step % 4 == 0)
    assert scored == [0, 4, 8]


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_the_expected_update_follows_the_reward(slope):
    """A student narrower than its teacher is pushed outwards on all sides; weighted, more so on the better side.

    The mean direction is 0 without weights, and the covariance of weight and direction with them.
    """
    method = dmd(ca=0.0, teacher=Gaussian(1.0).requires_grad_(False), fake=Gaussian(0.3), eps=10.0)
    term = RewardWeighting(scorer_of(Linear(slope)), low=0.0, high=10.0)
    batch = batch_of(count=4096)
    for _ in range(2):  # the first batch gives the statistics
        x = 1 + 0.3 * torch.randn(4096, *SHAPE)
        weights = term.sample_weights(1.0, sample_of(x), batch)
    terms = {name: each.term for name, each in method.terms.items()}
    delta = method.compute_directions(terms, x, torch.ones(4096), batch.prompts)["distribution_matching"].delta
    plain, weighted = delta.mean().item(), (weights[:, None, None, None] * delta).mean().item()
    outwards = (delta.flatten(1).mean(1) * (x.flatten(1).mean(1) - 1)).mean().item()
    assert outwards > 0
    assert abs(plain) < 0.2 * abs(weighted)
    assert weighted * slope > 0.5 * outwards / (0.3 / 8**0.5)  # to first order in z: the slope of the direction in z


def test_a_sample_without_a_score_keeps_its_direction():
    plain = dmd()
    method = dmd(terms=[weighting(Failing(), score_every=1)])
    method.terms["reward_weighting"].term.scorer.rewards.max_failures = 1.0
    batch = DistillBatch(batch_of().noise, batch_of().prompts, texts=["bad"] * COUNT)
    assert gradient_of(method, batch)[0] == pytest.approx(gradient_of(plain, batch)[0])


def test_advantage_weighting_applies_to_ca_alone_and_sums_to_nothing_in_a_group():
    """On Gaussians CA is the same for all samples, so weights of mean 1 leave its sum; DM keeps its own."""
    makes = [lambda sampler: ("advantage_weighting", AdvantageWeighting(scorer_of(Quadratic(0.0)), 3), 0.2)]
    batch, options = batch_of(), {"eps": 10.0, "group_size": 3, "fake": Gaussian(offset=1.0)}
    weighted, metrics = gradient_of(dmd(terms=makes, **options), batch)
    plain, _ = gradient_of(dmd(**options), batch)
    assert metrics["advantage_weighting"].item() == pytest.approx(1.0, abs=1e-6)
    assert metrics["advantage_weighting_spread"].item() > 0.05
    assert weighted != plain
    dm_only = dmd(ca=0.0, terms=makes, **options)
    assert gradient_of(dm_only, batch)[0] == pytest.approx(gradient_of(dmd(ca=0.0, **options), batch)[0])


def test_a_group_of_equal_scores_changes_nothing():
    makes = [lambda sampler: ("advantage_weighting", AdvantageWeighting(scorer_of(Linear(0.0)), 3), 1.0)]
    batch = batch_of()
    found = gradient_of(dmd(terms=makes, group_size=3), batch)[0]
    assert found == gradient_of(dmd(group_size=3), batch)[0]
