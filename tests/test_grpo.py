"""GRPO on Gaussians: ratios, groups, the sign of the expected update, what it may not do."""

import pytest
import torch
from dmd_setup import COUNT, LEVELS, SHIFT, batch_of, dmd, train_student
from gaussian import SHAPE, Gaussian, prompts_of
from reward_setup import Linear, Quadratic, scorer_of

from fewstep.config.load import load_recipe
from fewstep.core import flow
from fewstep.errors import UserError
from fewstep.methods.dmd.terms.grpo import GRPO, GRPOSettings
from fewstep.methods.dmd.terms.matching_reward import MatchingDivergence, MatchingSettings
from fewstep.methods.models_setup import build_models
from fewstep.methods.rl.grpo import gaussian_kl, policy_loss
from fewstep.models.pipeline import load

SIGMAS = flow.sigmas_from_timesteps(LEVELS, SHIFT)


def settings_of(**options):
    return GRPOSettings(rewards=[{"reward": "x"}], **options)


def grpo(reward, student, group_size=COUNT, reference=None, **options):
    return GRPO(student, scorer_of(reward), SIGMAS, group_size, settings_of(**options), reference)


def test_policy_loss_is_clipped_on_the_side_that_gains():
    ratio = torch.tensor([0.5, 0.5, 2.0, 2.0])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    log_prob = ratio.log().requires_grad_()
    loss = policy_loss(log_prob, torch.zeros(4), advantages, 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(-(0.5 - 0.9 + 1.1 - 2.0) / 4)
    torch.testing.assert_close(log_prob.grad, torch.tensor([-0.5, 0.0, 0.0, 2.0]) / 4)


def test_the_kl_divergence_is_that_of_torch():
    mean, reference = torch.randn(3, 2, 2, 2), torch.randn(3, 2, 2, 2)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, 0.7), normal(reference, 0.7)).flatten(1).mean(dim=1)
    torch.testing.assert_close(gaussian_kl(mean, reference, 0.7), expected)


def test_two_of_the_three_stochastic_steps_are_trained_and_the_last_is_deterministic():
    term = grpo(Linear(), Gaussian())
    seen = set()
    for _ in range(40):
        steps = term.collect(batch_of()).steps
        assert [step.index for step in steps] == sorted({step.index for step in steps})
        assert len(steps) == 2
        assert all(step.std > 0 and step.log_prob.dtype == torch.float32 for step in steps)
        seen |= {step.index for step in steps}
    assert seen == {0, 1, 2}


def test_on_the_policys_own_samples_every_ratio_is_1():
    term = grpo(Linear(), Gaussian(offset=0.3))
    term.loss(term.collect(batch_of())).backward()
    assert term.metrics()["grpo_ratio_diff"].item() == 0.0


@pytest.mark.parametrize("slope", [1.0, -1.0, 3.0])
def test_the_expected_update_has_the_sign_of_the_rewards_gradient_whatever_its_scale(slope):
    torch.manual_seed(0)
    student = Gaussian()
    term = grpo(Linear(slope), student, group_size=256)
    for _ in range(4):
        term.loss(term.collect(batch_of(count=256))).backward()
    assert student.offset.grad.item() * slope < -0.02 * abs(slope)


def test_a_quadratic_rewards_update_vanishes_at_its_optimum():
    """The same term on a student at the goal, and 1 below and above it."""
    gradients = []
    for offset in (-1.0, 0.0, 1.0):
        torch.manual_seed(0)
        student = Gaussian(offset=offset)
        term = grpo(Quadratic(1.0), student, group_size=512)  # the prompts' mean is 1
        for _ in range(4):
            term.loss(term.collect(batch_of(count=512))).backward()
        gradients.append(student.offset.grad.item())
    assert gradients[0] < -0.1
    assert gradients[2] > 0.1
    assert abs(gradients[1]) < 0.3 * gradients[2]


def test_groups_without_spread_give_no_gradient_at_all():
    student = Gaussian()
    term = grpo(Linear(0.0), student)
    term.loss(term.collect(batch_of())).backward()
    assert student.offset.grad.item() == 0.0


def test_with_dm_it_lands_between_teacher_and_goal_and_gradients_reach_the_student_alone():
    torch.manual_seed(0)
    teacher, student, fake = Gaussian(), Gaussian(), Gaussian()

    def policy(sampler):
        return "grpo", grpo(Quadratic(3.0), sampler.student, group_size=32, clip=0.2), 0.3

    method = dmd(
        ca=0.0, teacher=teacher, student=student, fake=fake, eps=10.0, ema_to_student=1.0, group_size=32,
        terms=[policy],
    )  # fmt: skip
    (part,) = [part for part in method.trainables if part.name == "student"]
    assert part.uses_collected
    metrics = train_student(method, student)
    assert {"grpo", "grpo_advantage_abs", "dm_abs", "score_r0"} <= metrics.keys()
    assert teacher.offset.grad is fake.offset.grad is None
    assert 0.1 < student.offset.item() < 2.0


def test_kl_pulls_back_to_the_reference():
    student, reference = Gaussian(offset=1.0), Gaussian().requires_grad_(False)
    term = grpo(Linear(0.0), student, reference=reference, kl_weight=1.0)
    term.loss(term.collect(batch_of())).backward()
    assert student.offset.grad > 0
    assert term.metrics()["grpo_kl"] > 0


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_reference_is_a_frozen_copy_of_the_student_as_it_begins(tiny_folder, train):
    recipe = load_recipe("micro-aligned", [f"teacher={tiny_folder}", f"models.train={train}"])
    models = build_models(recipe, load(tiny_folder), ["fake_score"], copies=["reference"])
    reference, student = models.copies["reference"], models.student.denoiser
    x, sigma, prompts = torch.randn(1, 16, 8, 8), torch.full((1,), 0.7), models.teacher.encode(["a fox"])
    with torch.no_grad():
        before = student(x, sigma, prompts)
        for weight in student.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        torch.testing.assert_close(reference(x, sigma, prompts), before)
        assert not torch.allclose(student(x, sigma, prompts), before, atol=1e-3)
    assert not any(weight.requires_grad for weight in reference.parameters())


# --- DMD as the reward --------------------------------------------------------------------------------------------


def divergence_of(teacher, fake, levels=4, group_size=1):
    return MatchingDivergence(teacher, fake, group_size, MatchingSettings(levels=levels))


def kept_share(deviation):
    """Of the log-ratio of Gaussians, the part between the levels of the estimate."""
    signal_to_noise = [((1 - level) / level) ** 2 * deviation**2 for level in (0.98, 0.02)]
    return 1 / (1 + signal_to_noise[0]) - 1 / (1 + signal_to_noise[1])


def test_the_mean_divergence_of_the_students_samples_is_kullback_leiblers():
    count, offset, deviation = 4000, 0.4, 0.5
    x0 = 1.0 + offset + deviation * torch.randn(count, *SHAPE)
    found = divergence_of(Gaussian(deviation), Gaussian(deviation, offset))(x0, prompts_of([1.0] * count))
    assert found.mean().item() == pytest.approx(kept_share(deviation) * offset**2 / (2 * deviation**2), rel=0.05)


@pytest.mark.parametrize("value", [0.5, 1.2, 2.0])
def test_the_divergence_of_a_sample_is_its_log_density_ratio(value):
    count, offset, deviation = 4000, 0.4, 0.5
    x0 = torch.full((count, *SHAPE), value)
    found = divergence_of(Gaussian(deviation), Gaussian(deviation, offset))(x0, prompts_of([1.0] * count))
    expected = ((value - 1.0) ** 2 - (value - 1.0 - offset) ** 2) / (2 * deviation**2)
    assert found.mean().item() == pytest.approx(expected, abs=0.05)


def test_where_fake_score_and_teacher_agree_the_divergence_is_0_and_a_group_shares_its_noise():
    x0 = torch.randn(1, *SHAPE).expand(COUNT, *SHAPE)
    assert divergence_of(Gaussian(), Gaussian())(x0, prompts_of([1.0] * COUNT)).tolist() == [0.0] * COUNT
    found = divergence_of(Gaussian(), Gaussian(offset=1.0), group_size=3)(x0, prompts_of([1.0] * COUNT))
    assert found[:3].unique().numel() == found[3:].unique().numel() == 1
    assert found[0] != found[3]


def test_with_dmd_as_the_only_reward_the_update_is_back_to_the_teacher():
    torch.manual_seed(0)
    for offset in (-1.0, 1.0):
        student, fake = Gaussian(offset=offset), Gaussian(offset=offset)
        term = grpo(Linear(0.0), student, group_size=256)
        term.divergence = divergence_of(Gaussian(), fake, group_size=256)
        for _ in range(4):
            with torch.no_grad():
                collected = term.collect(batch_of(count=256))
            term.loss(collected).backward()
        assert student.offset.grad.item() * offset > 0.02
        assert fake.offset.grad is None
        assert term.metrics()["grpo_divergence"] > 0


TERMS = "method.terms={cfg_augmentation: {}, distribution_matching: {}, grpo: {rewards: [{reward: x}]}}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.group_size=1"], r"grpo compares samples of one prompt"),
        (["student.steps=2"], "a student of 2 steps has too few stochastic ones"),
        (["method.terms.grpo.trained_steps=4"], "4 steps have 3 stochastic ones"),
        (["method.terms.distribution_matching=null", "optim.fake_score=null"], "nothing keeps the student"),
        (
            ["method.terms.distribution_matching=null", "optim.fake_score=null", "method.terms.grpo.matching={}"],
            "grpo.matching: it compares the teacher with the fake score",
        ),
    ],
)
def test_recipes_that_cannot_be_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        load_recipe("micro-aligned", [TERMS, "method.fake_score_start=0", "method.group_size=4", *overrides])


@pytest.mark.parametrize("name", ["nft", "diffusion-nft", "awm", "rwfm"])
def test_objectives_that_fail_on_distilled_students_are_refused_with_the_reason(name):
    with pytest.raises(UserError, match=f"{name} is refused for distilled students: .*; use reward for rewards"):
        load_recipe("micro-aligned", [f"method.terms={{distribution_matching: {{}}, {name}: {{}}}}"])
