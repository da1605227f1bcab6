"""DMDR's cold start: DynaRS, DynaDG, the tilted teacher, where the truth is known."""

import math

import pytest
import torch
from dmd_setup import COUNT, SHIFT, batch_of, dmd, fake_score
from gaussian import SHAPE, Gaussian, prompts_of
from reward_setup import Quadratic, scorer_of

from fewstep.config.load import load_recipe
from fewstep.core import flow
from fewstep.core.denoiser import predict_x0
from fewstep.core.schedules import Ramp
from fewstep.errors import UserError
from fewstep.methods.dmd.cold_start import DynaRS, beta_quantile, guidance_share
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.terms.distribution_matching import DistributionMatching
from fewstep.methods.dmd.terms.reward_tilt import RewardTilt
from fewstep.methods.models_setup import build_models
from fewstep.methods.rl.tilt import posterior_variance
from fewstep.models.pipeline import load

# --- DynaRS -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(4.0, 1.5), (1.0, 1.0), (2.0, 1.0), (1.0, 3.0)])
def test_beta_quantile_turns_uniform_draws_into_beta(a, b):
    """Against the moments of Beta(a, b), and in closed form where b is 1: u^(1/a)."""
    u = (torch.arange(100_000) + 0.5) / 100_000
    x = beta_quantile(u, a, b)
    assert x.mean().item() == pytest.approx(a / (a + b), abs=1e-4)
    assert x.var().item() == pytest.approx(a * b / ((a + b) ** 2 * (a + b + 1)), abs=1e-4)
    if b == 1:
        torch.testing.assert_close(x, u.pow(1 / a), atol=1e-4, rtol=1e-4)
    assert beta_quantile(torch.tensor([0.0, 1.0]), a, b).tolist() == pytest.approx([0.0, 1.0], abs=1e-4)


def dyna_rs(steps=100):
    return DynaRS(Ramp(4.0, 1.0, 0, steps, cosine=True), Ramp(1.5, 1.0, 0, steps, cosine=True))


@pytest.mark.parametrize(("step", "mean"), [(0, 4 / 5.5), (50, 2.5 / 3.75), (100, 0.5), (10_000, 0.5)])
def test_dm_and_the_fake_score_begin_at_high_noise_and_ca_keeps_its_levels(step, mean):
    """Levels before the shift, where 1 is noise; half a cosine down to the uniform distribution."""
    levels = dyna_rs()
    levels.step = step
    renoise = Renoise("hybrid", SHIFT, 0.0, 1.0, levels)
    anchor = torch.full((40_000,), 0.5)
    ca, dm = renoise.sample_sigmas(anchor)
    assert flow.unshift_sigma(dm, SHIFT).mean().item() == pytest.approx(mean, abs=5e-3)
    assert flow.unshift_sigma(ca, SHIFT).mean().item() == pytest.approx(0.25, abs=5e-3)
    fake = renoise.sample_fake_sigma(torch.zeros(40_000, 1))
    assert flow.unshift_sigma(fake, SHIFT).mean().item() == pytest.approx(mean, abs=5e-3)
    assert flow.unshift_sigma(renoise.sample_sigma(anchor[:, None]), SHIFT).mean().item() == pytest.approx(
        0.5, abs=5e-3
    )


def test_in_the_shared_schedule_both_terms_have_the_levels_of_dm():
    ca, dm = Renoise("shared", SHIFT, 0.0, 1.0, dyna_rs()).sample_sigmas(torch.ones(20_000))
    assert torch.equal(ca, dm)
    assert flow.unshift_sigma(dm, SHIFT).mean().item() == pytest.approx(4 / 5.5, abs=5e-3)


def test_after_its_steps_dyna_rs_changes_nothing():
    levels = dyna_rs()
    levels.step = 100
    drawn = []
    for renoise in (Renoise("hybrid", SHIFT, dm_levels=levels), Renoise("hybrid", SHIFT)):
        torch.manual_seed(0)
        drawn.append(renoise.sample_sigmas(torch.rand(100)))
    assert torch.equal(drawn[0][1], drawn[1][1])


# --- DynaDG -----------------------------------------------------------------------------------------------------


def test_guidance_share_is_half_a_cosine_to_zero():
    shares = [guidance_share(step, 0.5, 100) for step in (0, 25, 50, 100, 500)]
    assert shares == pytest.approx([0.5, 0.25 * (1 + math.cos(math.pi / 4)), 0.25, 0.0, 0.0])


LORA = [
    *("models.train=lora", "models.rank=2", "train.steps=4"),
    "method.terms={cfg_augmentation: {}, distribution_matching: {dyna_dg: {scale: 0.5, steps: 2}}}",
    *("method.fake_score_start=0", "optim.student={lr: 0.01}", "optim.fake_score={lr: 0.01}"),
]


def test_the_real_score_is_the_teacher_with_a_part_of_the_fake_scores_adapter(tiny_folder):
    recipe = load_recipe("micro-aligned", [f"teacher={tiny_folder}", *LORA])
    models = build_models(recipe, load(tiny_folder), ["fake_score"])
    fake = models.extra["fake_score"]
    for weight in fake.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    teacher = models.teacher.denoiser
    term = DistributionMatching(
        teacher, models.student.denoiser, fake, Renoise("hybrid", SHIFT), lambda batch: batch.noise,
        guidance=lambda step: guidance_share(step, 0.5, 2),
    )  # fmt: skip
    x, sigma, prompts = torch.randn(1, 16, 8, 8), torch.full((1,), 0.7), models.teacher.encode(["a fox"])
    with torch.no_grad():
        plain, faked = teacher(x, sigma, prompts), fake(x, sigma, prompts)
        term.before_step(0)
        assert term.teacher_prompts == ()
        guided = term.real_score(x, sigma, prompts)
        expected = type(fake)(teacher, {"fake_score": 0.5})(x, sigma, prompts)
        torch.testing.assert_close(guided, expected)
        assert (guided - plain).norm() > 0.05 * (faked - plain).norm() > 0
        term.before_step(1)
        closer = term.real_score(x, sigma, prompts)
        assert 0 < (closer - plain).norm() < (guided - plain).norm()
        term.before_step(2)
        assert term.teacher_prompts == ("cond",)
        torch.testing.assert_close(term.real_score(x, sigma, prompts), plain)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.terms.distribution_matching.dyna_dg={}", "set models.train: lora"),
        ("method.renoise.dyna_rs={steps: 0}", "at least 1 step"),
    ],
)
def test_schedules_that_cannot_be_are_refused(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe("micro-aligned", [override])


# --- the tilted teacher -----------------------------------------------------------------------------------------


def test_posterior_variance_is_that_of_a_gaussian():
    """Against the deviation of x0 given x, from the joint covariance of both."""
    sigma = torch.tensor([0.1, 0.5, 0.9])
    s = 0.5
    for level, found in zip(sigma, posterior_variance(sigma, torch.zeros(3, 1), s).flatten(), strict=True):
        covariance = torch.tensor([[s**2, (1 - level) * s**2], [(1 - level) * s**2, ((1 - level) * s) ** 2 + level**2]])
        assert found.item() == pytest.approx(
            (covariance[0, 0] - covariance[0, 1] ** 2 / covariance[1, 1]).item(), rel=1e-5
        )
    assert posterior_variance(torch.tensor([0.0, 1.0]), torch.zeros(2, 1), s).flatten().tolist() == [0.0, s**2]


def test_the_tilt_is_that_of_the_exact_tilted_gaussian_to_first_order():
    """N(m, s^2) times exp(-(x - g)^2 / 2T) is a Gaussian with another mean and deviation; its prediction is known."""
    temperature, goal, deviation = 1e4, -3.0, 1.0
    teacher = Gaussian(deviation).requires_grad_(False)
    scale = 2 * 2 * 2  # the reward is a mean over the elements of a sample
    term = RewardTilt(
        teacher, scorer_of(Quadratic(goal)), {"r0": scale}, Renoise("hybrid", SHIFT, 0.6, 0.6), temperature, 0.1
    )
    sample = dmd(levels=(1.0,)).sampler(batch_of())
    batch = batch_of()
    torch.manual_seed(4)
    added, _ = term.direction(sample, batch)

    torch.manual_seed(4)
    sigma = torch.full((COUNT,), 0.6)
    term.renoise.sample_sigmas(sample.anchor)
    x = flow.add_noise(sample.x0.detach(), sigma, torch.randn(COUNT, *SHAPE))
    precision = 1 / deviation**2 + 1 / temperature
    tilted_mean = (1.0 / deviation**2 + goal / temperature) / precision
    prompts = prompts_of([1.0] * COUNT)
    exact = predict_x0(Gaussian(precision**-0.5, tilted_mean - 1.0), x, sigma, prompts)
    plain = predict_x0(teacher, x, sigma, prompts)
    torch.testing.assert_close(added, (exact - plain).detach(), atol=2e-6, rtol=2e-2)


def test_the_tilt_moves_the_student_from_the_teacher_towards_the_reward():
    """The stronger, the further; without it DM alone keeps the student at the teacher."""
    offsets = []
    for temperature in (1e9, 1.0, 0.25):

        def tilted(sampler, temperature=temperature):
            term = RewardTilt(
                Gaussian().requires_grad_(False), scorer_of(Quadratic(4.0)), {"r0": 1.0}, Renoise("hybrid", SHIFT),
                temperature, 10.0,
            )  # fmt: skip
            return "reward_tilt", term, 1.0

        torch.manual_seed(0)
        student = Gaussian()
        method = dmd(ca=0.0, student=student, levels=(1.0,), eps=10.0, ema_to_student=1.0, terms=[tilted])
        optimizer = torch.optim.SGD([student.offset], lr=8.0)
        for step in range(40):
            method.after_step(step)
            loss, _ = method.compute_student_loss(batch_of(count=32))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        offsets.append(student.offset.item())
        assert fake_score(method).offset.grad is None
    assert abs(offsets[0]) < 0.1 < offsets[1] < offsets[2] < 3.0
