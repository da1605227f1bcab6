"""DMD where the truth is known: directions, signs, bounds."""

import pytest
import torch
from dmd_setup import COUNT, EPS, SHIFT, batch_of, directions, dmd, fake_score
from gaussian import SHAPE, Gaussian, prompts_of

from fewstep.core import flow
from fewstep.core.denoiser import predict_x0
from fewstep.core.guidance import ClassifierFreeGuidance
from fewstep.methods.dmd.normalize import dmd_weight, pseudo_target_loss
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.terms.distribution_matching import downsample, upsample_grad

# --- directions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 2.5, 4.0])
def test_ca_direction_in_closed_form(alpha):
    """CA = (alpha - 1)(m_cond - m_null)(1 - (1 - sigma) shrink): equal in every element, whatever the noise."""
    method = dmd(alpha=alpha, dm=0.0, null_mean=-0.5)
    x, prompts, anchor = torch.randn(COUNT, *SHAPE), prompts_of([1.0] * COUNT), torch.full((COUNT,), 0.5)
    torch.manual_seed(3)
    delta, _ = directions(method, x, anchor, prompts)

    torch.manual_seed(3)
    sigma, _ = method.renoise.sample_sigmas(anchor)
    teacher, level = method.teacher, sigma.reshape(-1, 1, 1, 1)
    keep = teacher.shrink(level)
    x_ca = flow.add_noise(x, sigma, torch.randn_like(x))
    x0_cond = 1.0 + keep * (x_ca - (1 - level))
    ca = (alpha - 1) * (1.0 - -0.5) * (1 - (1 - level) * keep).expand_as(x)
    expected = ca / (x0_cond - x).abs().mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(delta, expected, atol=1e-4, rtol=1e-4)


def test_dm_direction_points_from_fake_score_to_teacher():
    method = dmd(ca=0.0, fake=Gaussian(offset=2.0))
    delta, metrics = directions(method, torch.randn(COUNT, *SHAPE), torch.ones(COUNT), prompts_of([1.0] * COUNT))
    assert (delta < 0).all()  # the fake score's samples are 2 above the teacher's, so the student must move down
    assert set(metrics) == {"dm_abs", "fake_score_loss_ratio"}


def test_shared_schedule_is_plain_dmd():
    """CA + DM at one noisy sample are the guided teacher less the fake score, with two teacher predictions."""
    method = dmd(renoise=Renoise("shared", SHIFT), alpha=3.0, fake=Gaussian(offset=0.7), null_mean=-0.5)
    x, prompts, anchor = torch.randn(COUNT, *SHAPE), prompts_of([1.0] * COUNT), torch.full((COUNT,), 0.5)
    torch.manual_seed(3)
    delta, _ = directions(method, x, anchor, prompts)
    assert [count for count, _ in method.teacher.calls] == [2 * COUNT]

    torch.manual_seed(3)
    sigma, _ = method.renoise.sample_sigmas(anchor)
    noisy = flow.add_noise(x, sigma, torch.randn_like(x))
    guided = predict_x0(ClassifierFreeGuidance(method.teacher, prompts_of([-0.5]), 3.0), noisy, sigma, prompts)
    plain = guided - predict_x0(fake_score(method), noisy, sigma, prompts)
    n = dmd_weight(predict_x0(method.teacher, noisy, sigma, prompts), x, EPS)
    torch.testing.assert_close(delta, plain / n, atol=1e-4, rtol=1e-4)


def test_multiscale_dm_moves_whole_blocks():
    """At half the size a shifted sample is pulled back, in whole 2x2 blocks."""
    fine = dmd(ca=0.0, fake=Gaussian(offset=2.0))
    both = dmd(ca=0.0, fake=Gaussian(offset=2.0), scales={2: 0.5})
    x, prompts = torch.randn(COUNT, *SHAPE), prompts_of([1.0] * COUNT)
    deltas = []
    for method in (fine, both):
        torch.manual_seed(5)
        delta, metrics = directions(method, x, torch.ones(COUNT), prompts)
        deltas.append(delta)
    coarse = deltas[1] - deltas[0]
    assert metrics["dm_abs_2"] > 0
    assert (coarse < 0).all()  # the fake score's samples are above the teacher's at this scale too
    blocks = coarse.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))
    torch.testing.assert_close(blocks, blocks.mean(dim=(3, 5), keepdim=True).expand_as(blocks))


def test_upsample_grad_is_the_gradient_of_the_downsampled_loss():
    x, small = torch.randn(COUNT, 2, 4, 4, requires_grad=True), torch.randn(COUNT, 2, 2, 2)
    pseudo_target_loss(downsample(x, 2), small).backward()
    torch.testing.assert_close(-x.grad * x.numel(), upsample_grad(small, 2))


@pytest.mark.parametrize(("scales", "sizes"), [({}, {2}), ({2: 1.0}, {2, 1})])
def test_fake_score_trains_at_every_scale_of_dm(scales, sizes):
    method = dmd(scales=scales)
    seen = []
    fake_score(method).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    method.trainables[1].loss(batch_of())
    assert set(seen) == sizes


def test_directions_vanish_where_the_student_is_the_teacher():
    """Without guidance and with a fake score that equals the teacher both terms are zero."""
    delta, _ = directions(dmd(alpha=1.0), torch.randn(COUNT, *SHAPE), torch.ones(COUNT), prompts_of([1.0] * COUNT))
    assert delta.abs().max() < 1e-5


def test_teacher_runs_one_batched_forward():
    method = dmd()
    directions(method, torch.randn(COUNT, *SHAPE), torch.ones(COUNT), prompts_of([1.0] * COUNT))
    assert [count for count, _ in method.teacher.calls] == [3 * COUNT]
    assert [count for count, _ in fake_score(method).calls] == [COUNT]


def test_directions_take_latents_of_any_rank():
    """Video latents have five dimensions; the multi-scale part is for images."""
    teacher, fake = Gaussian().requires_grad_(False), Gaussian(offset=1.0)
    method = dmd(teacher=teacher, fake=fake)
    x = torch.randn(3, 2, 4, 2, 2)
    delta, _ = directions(method, x, torch.ones(3), prompts_of([1.0] * 3))
    assert delta.shape == x.shape


# --- normalization and loss ---------------------------------------------------------------------------------------


def test_normalizer_is_per_sample_and_clamped():
    x = torch.zeros(2, *SHAPE)
    teacher = torch.stack([torch.full(SHAPE, 3.0), torch.full(SHAPE, 0.001)])
    torch.testing.assert_close(dmd_weight(teacher, x, 0.1).flatten(), torch.tensor([3.0, 0.1]))


def test_pseudo_target_loss_has_the_half_and_the_sign():
    x = torch.zeros(1, *SHAPE, requires_grad=True)
    delta = torch.full((1, *SHAPE), 2.0)
    loss = pseudo_target_loss(x, delta)
    assert loss.item() == pytest.approx(0.5 * 4.0)
    loss.backward()
    torch.testing.assert_close(x.grad, -delta / x.numel())


def test_direction_of_a_sample_does_not_depend_on_its_batch():
    """Large and small samples side by side: the normalizer must not mix them."""
    method = dmd(renoise=Renoise("hybrid", SHIFT, low=0.5, high=0.5), fake=Gaussian(offset=0.3))
    x = torch.stack([torch.full(SHAPE, 0.1), torch.full(SHAPE, 50.0)])

    def fixed_noise(rows):
        torch.manual_seed(0)
        noise = torch.randn(2, *SHAPE)[rows]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda _: noise)
            return directions(method, x[rows], torch.ones(len(rows)), prompts_of([1.0] * len(rows)))[0]

    together = fixed_noise([0, 1])
    alone = torch.cat([fixed_noise([0]), fixed_noise([1])])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


# --- renoise schedules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["shared", "full", "constrained", "hybrid"])
def test_renoise_schedule_is_bounded_before_the_shift(schedule):
    torch.manual_seed(0)
    anchor = torch.full((20_000,), 0.25)
    bound = flow.shift_sigma(0.25, SHIFT)  # 0.5
    sigma_ca, sigma_dm = Renoise(schedule, SHIFT, 0.0, 1.0).sample_sigmas(anchor)
    expected_ca = bound if schedule in ("constrained", "hybrid") else 1.0
    expected_dm = bound if schedule == "constrained" else 1.0
    assert sigma_ca.max().item() == pytest.approx(expected_ca, abs=2e-3)
    assert sigma_dm.max().item() == pytest.approx(expected_dm, abs=2e-3)
    mean = 0.125 if expected_ca == bound else 0.5  # uniform before the shift
    assert flow.unshift_sigma(sigma_ca, SHIFT).mean().item() == pytest.approx(mean, abs=5e-3)
    assert torch.equal(sigma_ca, sigma_dm) == (schedule == "shared")


def test_ca_is_cleaner_than_the_students_input():
    torch.manual_seed(0)
    anchor = torch.rand(5000)
    sigma_ca, _ = Renoise("hybrid", SHIFT, 0.0, 1.0).sample_sigmas(anchor)
    assert (sigma_ca <= flow.shift_sigma(anchor, SHIFT)).all()


def test_sigmas_are_clamped():
    sigma_ca, sigma_dm = Renoise("full", SHIFT).sample_sigmas(torch.ones(10_000))
    for sigma in (sigma_ca, sigma_dm):
        assert sigma.min().item() == pytest.approx(0.02)
        assert sigma.max().item() == pytest.approx(0.98)
