"""Decoupled-DMD where the truth is known: directions, signs, bounds, gradient routing, and that it learns."""

from dataclasses import replace

import pytest
import torch
from gaussian import SHAPE, Gaussian, prompts_of

from fewstep.core import flow
from fewstep.core.denoiser import predict_x0
from fewstep.core.guidance import ClassifierFreeGuidance
from fewstep.data.batch import DistillBatch
from fewstep.data.teacher_trajectories import teacher_trajectory
from fewstep.methods.dmd.method import DecoupledDMD, DMDSettings, dmd_weight, pseudo_target_loss
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.rollout import backward_simulation, sample_rollout_timesteps
from fewstep.methods.dmd.terms.shields import downsample, upsample_grad
from fewstep.methods.trajectory import trajectory_mse

SHIFT = 3.0
COUNT = 6
SETTINGS = DMDSettings(
    anchors=(1.0, 0.75, 0.5, 0.25), alpha=4.0, renoise=Renoise("hybrid", SHIFT), fake_updates=3, dmd_norm_eps=1e-6
)


def method_of(settings=SETTINGS, *, teacher=None, student=None, fake=None, null_mean=0.0):
    return DecoupledDMD(
        teacher or Gaussian().requires_grad_(False),
        student or Gaussian(),
        fake or Gaussian(),
        prompts_of([null_mean]),
        settings,
    )


def batch_of(mean=1.0, count=COUNT):
    return DistillBatch(torch.randn(count, *SHAPE), prompts_of([mean] * count))


# --- directions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 2.5, 4.0])
def test_ca_direction_in_closed_form(alpha):
    """CA = (alpha - 1)(m_cond - m_null)(1 - (1 - sigma) shrink): the same in every element, whatever the noise."""
    settings = replace(SETTINGS, alpha=alpha, shield=0.0)
    method = method_of(settings, null_mean=-0.5)
    x, prompts, anchor = torch.randn(COUNT, *SHAPE), prompts_of([1.0] * COUNT), torch.full((COUNT,), 0.5)
    torch.manual_seed(3)
    delta, _ = method.direction(x, anchor, prompts)

    torch.manual_seed(3)
    sigma, _ = settings.renoise.sample_sigmas(anchor)
    teacher, level = method.teacher, sigma.reshape(-1, 1, 1, 1)
    keep = teacher.shrink(level)
    x_ca = flow.add_noise(x, sigma, torch.randn_like(x))
    x0_cond = 1.0 + keep * (x_ca - (1 - level))
    ca = (alpha - 1) * (1.0 - -0.5) * (1 - (1 - level) * keep).expand_as(x)
    expected = ca / (x0_cond - x).abs().mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(delta, expected, atol=1e-4, rtol=1e-4)


def test_dm_direction_points_from_fake_to_teacher():
    method = method_of(replace(SETTINGS, spear=0.0), fake=Gaussian(offset=2.0))
    delta, metrics = method.direction(torch.randn(COUNT, *SHAPE), torch.ones(COUNT), prompts_of([1.0] * COUNT))
    assert (delta < 0).all()  # the fake's images lie 2 above the teacher's, so the student must go down
    assert set(metrics) == {"dm", "fake_lag"}


def test_shared_schedule_is_plain_dmd():
    """CA + DM at one noisy image are the guided teacher less the fake; the teacher is asked two questions."""
    settings = replace(SETTINGS, renoise=Renoise("shared", SHIFT), alpha=3.0)
    method = method_of(settings, fake=Gaussian(offset=0.7), null_mean=-0.5)
    x, prompts, anchor = torch.randn(COUNT, *SHAPE), prompts_of([1.0] * COUNT), torch.full((COUNT,), 0.5)
    torch.manual_seed(3)
    delta, _ = method.direction(x, anchor, prompts)
    assert [count for count, _ in method.teacher.calls] == [2 * COUNT]

    torch.manual_seed(3)
    sigma, _ = settings.renoise.sample_sigmas(anchor)
    noisy = flow.add_noise(x, sigma, torch.randn_like(x))
    guided = predict_x0(ClassifierFreeGuidance(method.teacher, prompts_of([-0.5]), 3.0), noisy, sigma, prompts)
    plain = guided - predict_x0(method.fake, noisy, sigma, prompts)
    n = dmd_weight(predict_x0(method.teacher, noisy, sigma, prompts), x, settings.dmd_norm_eps)
    torch.testing.assert_close(delta, plain / n, atol=1e-4, rtol=1e-4)


def test_coarser_matching_sees_what_is_coarse():
    """At half the size a shifted image is pulled back, in whole squares."""
    fine = method_of(replace(SETTINGS, spear=0.0, shield=1.0), fake=Gaussian(offset=2.0))
    both = method_of(replace(SETTINGS, spear=0.0, shield=1.0, scales=((2, 0.5),)), fake=Gaussian(offset=2.0))
    x, prompts = torch.randn(COUNT, *SHAPE), prompts_of([1.0] * COUNT)
    deltas = []
    for method in (fine, both):
        torch.manual_seed(5)
        delta, metrics = method.direction(x, torch.ones(COUNT), prompts)
        deltas.append(delta)
    coarse = deltas[1] - deltas[0]
    assert metrics["dm_2"] > 0
    assert (coarse < 0).all()  # the fake's images lie above the teacher's at this scale too
    squares = coarse.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))
    torch.testing.assert_close(squares, squares.mean(dim=(3, 5), keepdim=True).expand_as(squares))


def test_coarser_direction_is_the_gradient_of_the_coarse_loss():
    """enlarge() gives what regression at the smaller size gives through shrink(), over as many elements."""
    x, small = torch.randn(COUNT, 2, 4, 4, requires_grad=True), torch.randn(COUNT, 2, 2, 2)
    pseudo_target_loss(downsample(x, 2), small).backward()
    torch.testing.assert_close(-x.grad * x.numel(), upsample_grad(small, 2))


def test_fake_learns_the_coarser_images_too():
    """Where no coarser image is wanted the fake sees whole ones alone."""
    for scales, sizes in (((), {2}), (((2, 1.0),), {2, 1})):
        method = method_of(replace(SETTINGS, scales=scales))
        seen = []
        method.fake.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].shape[-1]))
        method.fake_loss(batch_of())
        assert set(seen) == sizes


def test_no_direction_where_student_is_already_the_teacher():
    """Without guidance and with a fake that equals the teacher both terms vanish."""
    method = method_of(replace(SETTINGS, alpha=1.0))
    delta, _ = method.direction(torch.randn(COUNT, *SHAPE), torch.ones(COUNT), prompts_of([1.0] * COUNT))
    assert delta.abs().max() < 1e-5


def test_teacher_is_asked_once():
    method = method_of()
    method.direction(torch.randn(COUNT, *SHAPE), torch.ones(COUNT), prompts_of([1.0] * COUNT))
    assert [count for count, _ in method.teacher.calls] == [3 * COUNT]
    assert [count for count, _ in method.fake.calls] == [COUNT]


# --- normaliser and loss ----------------------------------------------------------------------------------------


def test_normaliser_is_per_sample_and_clamped():
    x = torch.zeros(2, *SHAPE)
    teacher = torch.stack([torch.full(SHAPE, 3.0), torch.full(SHAPE, 0.001)])
    torch.testing.assert_close(dmd_weight(teacher, x, 0.1).flatten(), torch.tensor([3.0, 0.1]))


def test_regression_has_the_half_and_the_sign():
    x = torch.zeros(1, *SHAPE, requires_grad=True)
    delta = torch.full((1, *SHAPE), 2.0)
    loss = pseudo_target_loss(x, delta)
    assert loss.item() == pytest.approx(0.5 * 4.0)
    loss.backward()
    torch.testing.assert_close(x.grad, -delta / x.numel())


def test_direction_does_not_depend_on_who_shares_the_batch():
    """Large and small samples side by side: the normaliser must not mix them."""
    settings = replace(SETTINGS, renoise=Renoise("hybrid", SHIFT, low=0.5, high=0.5))
    method = method_of(settings, fake=Gaussian(offset=0.3))
    x = torch.stack([torch.full(SHAPE, 0.1), torch.full(SHAPE, 50.0)])

    def fixed_noise(rows):
        torch.manual_seed(0)
        noise = torch.randn(2, *SHAPE)[rows]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda _: noise)
            return method.direction(x[rows], torch.ones(len(rows)), prompts_of([1.0] * len(rows)))[0]

    together = fixed_noise([0, 1])
    alone = torch.cat([fixed_noise([0]), fixed_noise([1])])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


# --- renoise schedules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["shared", "full", "constrained", "hybrid"])
def test_schedule_bounds(schedule):
    torch.manual_seed(0)
    anchor = torch.full((20_000,), 0.25)
    bound = flow.shift_sigma(0.25, SHIFT)  # 0.5: bounded before the shift, then shifted
    sigma_ca, sigma_dm = Renoise(schedule, SHIFT, 0.0, 1.0).sample_sigmas(anchor)
    expected_ca = bound if schedule in ("constrained", "hybrid") else 1.0
    expected_dm = bound if schedule == "constrained" else 1.0
    assert sigma_ca.max().item() == pytest.approx(expected_ca, abs=2e-3)
    assert sigma_dm.max().item() == pytest.approx(expected_dm, abs=2e-3)
    # uniform before the shift
    assert flow.unshift_sigma(sigma_ca, SHIFT).mean().item() == pytest.approx(
        0.125 if expected_ca == bound else 0.5, abs=5e-3
    )
    assert torch.equal(sigma_ca, sigma_dm) == (schedule == "shared")


def test_spear_is_cleaner_than_the_students_input():
    torch.manual_seed(0)
    anchor = torch.rand(5000)
    sigma_ca, _ = Renoise("hybrid", SHIFT, 0.0, 1.0).sample_sigmas(anchor)
    assert (sigma_ca <= flow.shift_sigma(anchor, SHIFT)).all()


def test_sigmas_are_clamped():
    sigma_ca, sigma_dm = Renoise("full", SHIFT).sample_sigmas(torch.ones(10_000))
    for sigma in (sigma_ca, sigma_dm):
        assert sigma.min().item() == pytest.approx(0.02)
        assert sigma.max().item() == pytest.approx(0.98)


# --- rollout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "sde"])
def test_rollout_arrives_with_the_right_spread(sampler):
    """At sigma the input's deviation is that of (1 - sigma) x0 + sigma eps: noise is neither lost nor added twice."""
    torch.manual_seed(0)
    sigmas = flow.get_sigmas(64, SHIFT)  # so fine that Euler is nearly exact
    noise = torch.randn(1, 2, 128, 128)
    z = backward_simulation(Gaussian(deviation=0.5), noise, sigmas[:49], prompts_of([1.0]), sampler)
    sigma = sigmas[48]
    spread = ((1 - sigma) ** 2 * 0.25 + sigma**2) ** 0.5
    assert z.mean().item() == pytest.approx(1 - sigma, abs=0.02)
    if sampler == "euler":  # renoising keeps only the mean of what it predicts, so its spread is smaller
        assert z.std().item() == pytest.approx(spread, rel=0.03)


def test_rollout_to_the_first_anchor_is_the_noise():
    noise = torch.randn(2, *SHAPE)
    assert torch.equal(
        backward_simulation(Gaussian(), noise, flow.get_sigmas(4, SHIFT)[:1], prompts_of([0.0] * 2)), noise
    )


def test_rollout_takes_no_gradient():
    student = Gaussian()
    assert not backward_simulation(
        student, torch.randn(2, *SHAPE), flow.get_sigmas(4, SHIFT)[:3], prompts_of([0.0] * 2)
    ).requires_grad


def test_ways_of_a_rollout():
    torch.manual_seed(0)
    anchors = SETTINGS.anchors
    fixed = [sample_rollout_timesteps(anchors, "fixed") for _ in range(200)]
    assert {len(way) for way in fixed} == {1, 2, 3, 4}
    assert all(way == list(anchors[: len(way)]) for way in fixed)
    drawn = [sample_rollout_timesteps(anchors, "continuous") for _ in range(4000)]
    assert {len(way) for way in drawn} == {1, 2, 3, 4}
    assert all(way[0] == 1.0 and way == sorted(way, reverse=True) and way[-1] > 0 for way in drawn)
    last = torch.tensor([way[-1] for way in drawn if len(way) == 4])
    assert last.mean().item() == pytest.approx(0.25, abs=0.02)  # the least of three uniform draws


# --- who gets which gradient ------------------------------------------------------------------------------------


def test_gradients_reach_their_own_player_alone():
    teacher = Gaussian()  # left trainable on purpose: even so nothing may reach it
    method = method_of(teacher=teacher)
    loss, _ = method.student_loss(batch_of())
    loss.backward()
    assert method.student.offset.grad is not None
    assert method.fake.offset.grad is None
    assert teacher.offset.grad is None

    method.student.offset.grad = None
    loss, _ = method.fake_loss(batch_of())
    loss.backward()
    assert method.fake.offset.grad is not None
    assert method.student.offset.grad is None
    assert teacher.offset.grad is None


def test_players_and_their_pace():
    assert [(p.name, p.updates_per_step) for p in method_of().trainables] == [("student", 1), ("fake", 3)]
    assert [p.name for p in method_of(replace(SETTINGS, shield=0.0)).trainables] == ["student"]
    late = method_of(replace(SETTINGS, align_steps=9, fake_warmup=4))
    assert [(p.name, p.start_step) for p in late.trainables] == [("student", 0), ("fake", 5)]
    early = replace(SETTINGS, fake_warmup=4)
    assert [(p.name, p.start_step) for p in method_of(early).trainables] == [("student", 4), ("fake", 0)]
    assert method_of(replace(early, shield=0.0)).trainables[0].start_step == 0  # there is no fake to wait for


def test_alignment_follows_the_teacher_and_then_ends():
    """Until the step it was told the student's loss is its distance from the teacher's way, without CA or DM."""
    teacher = Gaussian().requires_grad_(False)
    method = method_of(replace(SETTINGS, align_steps=2), teacher=teacher, student=Gaussian(offset=0.5))
    drawn = batch_of()
    noise, prompts = drawn.noise, drawn.prompts
    states = teacher_trajectory(teacher, noise, list(SETTINGS.anchors), 1, SHIFT, prompts)
    batch = DistillBatch(noise, prompts, states)
    method.before_step(1)
    loss, metrics = method.student_loss(batch)
    expected = sum(trajectory_mse(method.student, batch, SETTINGS.sigmas))
    torch.testing.assert_close(loss, expected)
    assert metrics == {}
    method.before_step(2)
    assert {"ca", "dm"} <= method.student_loss(batch)[1].keys()


# --- learning ---------------------------------------------------------------------------------------------------


def train(method, steps=200, lr=0.05):
    optimizers = {p.name: torch.optim.Adam(p.module.parameters(), lr=lr) for p in method.trainables}
    for step in range(steps):
        for trainable in method.trainables:
            for _ in range(trainable.updates_per_step):
                loss, _ = trainable.loss(batch_of(count=32))
                optimizers[trainable.name].zero_grad()
                loss.backward()
                optimizers[trainable.name].step()
        method.after_step(step)


def test_shield_alone_brings_the_student_to_the_teacher():
    torch.manual_seed(0)
    method = method_of(replace(SETTINGS, spear=0.0), student=Gaussian(offset=1.5), fake=Gaussian(offset=1.5))
    train(method)
    assert abs(method.student.offset.item()) < 0.25
    assert method.fake.offset.item() == pytest.approx(method.student.offset.item(), abs=0.3)


def test_spear_drives_along_the_guidance_and_the_shield_holds_it():
    """With the null prompt's mean below, guidance pulls up: CA alone runs away, with DM it settles near the teacher."""
    offsets = {}
    for shield in (0.0, 1.0):
        torch.manual_seed(0)
        method = method_of(replace(SETTINGS, shield=shield, alpha=1.2), null_mean=0.0)
        train(method)
        offsets[shield] = method.student.offset.item()
    assert offsets[0.0] > 2.0
    assert 0.0 < offsets[1.0] < 0.6 * offsets[0.0]


def test_fake_follows_the_student_where_asked():
    method = method_of(replace(SETTINGS, fake_follow=0.25), student=Gaussian(offset=4.0), fake=Gaussian(offset=0.0))
    method.after_step(1)
    assert method.fake.offset.item() == pytest.approx(1.0)
    assert method.student.offset.item() == 4.0


def test_guidance_convention():
    """Users' g and the inside alpha: cond + g (cond - null) is null + (g + 1)(cond - null)."""
    model, prompts, null = Gaussian(), prompts_of([1.0, -1.0]), prompts_of([0.25])
    x, sigma, g = torch.randn(2, *SHAPE), torch.tensor([0.3, 0.8]), 2.5
    cond, empty = model(x, sigma, prompts), model(x, sigma, null.repeat(2))
    guided = ClassifierFreeGuidance(model, null, alpha=g + 1)(x, sigma, prompts)
    torch.testing.assert_close(guided, cond + g * (cond - empty), atol=1e-5, rtol=1e-5)
