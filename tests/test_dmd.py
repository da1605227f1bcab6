"""DMD where the truth is known: directions, signs, bounds, gradient routing, and that it trains the student."""

import pytest
import torch
from gaussian import SHAPE, Gaussian, prompts_of

from fewstep.core import flow
from fewstep.core.denoiser import predict_x0
from fewstep.core.guidance import ClassifierFreeGuidance
from fewstep.core.schedules import Constant, Piecewise, Ramp
from fewstep.data.batch import DistillBatch
from fewstep.data.teacher_trajectories import teacher_trajectory
from fewstep.methods.dmd.method import DMD, WeightedTerm
from fewstep.methods.dmd.normalize import dmd_weight, pseudo_target_loss
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.rollout import backward_simulation, sample_rollout_timesteps
from fewstep.methods.dmd.student_sampler import StudentSampler
from fewstep.methods.dmd.terms.cfg_augmentation import CFGAugmentation
from fewstep.methods.dmd.terms.distribution_matching import DistributionMatching, downsample, upsample_grad
from fewstep.methods.dmd.terms.trajectory_mse import TrajectoryMSE
from fewstep.methods.trajectory import trajectory_mse

SHIFT = 3.0
COUNT = 6
LEVELS = (1.0, 0.75, 0.5, 0.25)
EPS = 1e-6


def dmd(
    *,
    ca=1.0,
    dm=1.0,
    alpha=4.0,
    renoise=None,
    teacher=None,
    student=None,
    fake=None,
    null_mean=0.0,
    more=None,
    total_steps=10,
    **dm_options,
):
    """DMD on Gaussians, with CA and DM by weight (a number or a schedule; 0 leaves the term out)."""
    renoise = renoise or Renoise("hybrid", SHIFT)
    teacher = teacher or Gaussian().requires_grad_(False)
    student, fake = student or Gaussian(), fake or Gaussian()
    sampler = StudentSampler(student, LEVELS, SHIFT)
    terms = {}
    if ca:
        terms["cfg_augmentation"] = CFGAugmentation(alpha, EPS), ca
    if dm:
        matching = DistributionMatching(
            teacher, student, fake, renoise, sampler.fresh, eps=EPS, **{"updates": 3, **dm_options}
        )
        terms["distribution_matching"] = matching, dm
    if more:
        terms["trajectory_mse"] = TrajectoryMSE(student, sampler.sigmas), more
    weighted = {
        name: WeightedTerm(term, Constant(weight) if isinstance(weight, float) else weight)
        for name, (term, weight) in terms.items()
    }
    return DMD(teacher, sampler, prompts_of([null_mean]), renoise, weighted, total_steps)


def fake_score(method):
    return method.terms["distribution_matching"].term.fake_score


def directions(method, x, anchor, prompts):
    """The weighted sum of all directions, and their metrics."""
    terms = {name: each.term for name, each in method.terms.items()}
    found = method.compute_directions(terms, x, anchor, prompts)
    metrics = {key: value for each in found.values() for key, value in each.metrics.items()}
    return sum(method.terms[name].weight(0) * each.delta for name, each in found.items()), metrics


def batch_of(mean=1.0, count=COUNT):
    return DistillBatch(torch.randn(count, *SHAPE), prompts_of([mean] * count))


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


# --- backward simulation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "sde"])
def test_backward_simulation_has_the_deviation_of_its_level(sampler):
    """At sigma the deviation is that of (1 - sigma) x0 + sigma eps: noise is neither lost nor added twice."""
    torch.manual_seed(0)
    sigmas = flow.get_sigmas(64, SHIFT)  # so fine that Euler is nearly exact
    noise = torch.randn(1, 2, 128, 128)
    z = backward_simulation(Gaussian(deviation=0.5), noise, sigmas[:49], prompts_of([1.0]), sampler)
    sigma = sigmas[48]
    deviation = ((1 - sigma) ** 2 * 0.25 + sigma**2) ** 0.5
    assert z.mean().item() == pytest.approx(1 - sigma, abs=0.02)
    if sampler == "euler":  # renoising keeps only the mean of the prediction, so its deviation is smaller
        assert z.std().item() == pytest.approx(deviation, rel=0.03)


def test_backward_simulation_to_the_first_anchor_is_the_noise():
    noise = torch.randn(2, *SHAPE)
    assert torch.equal(backward_simulation(Gaussian(), noise, [1.0], prompts_of([0.0] * 2)), noise)


def test_backward_simulation_takes_no_gradient():
    sigmas = flow.get_sigmas(4, SHIFT)[:3]
    assert not backward_simulation(Gaussian(), torch.randn(2, *SHAPE), sigmas, prompts_of([0.0] * 2)).requires_grad


def test_timesteps_of_a_rollout():
    torch.manual_seed(0)
    fixed = [sample_rollout_timesteps(LEVELS, "fixed") for _ in range(200)]
    assert {len(levels) for levels in fixed} == {1, 2, 3, 4}
    assert all(levels == list(LEVELS[: len(levels)]) for levels in fixed)
    drawn = [sample_rollout_timesteps(LEVELS, "continuous") for _ in range(4000)]
    assert {len(levels) for levels in drawn} == {1, 2, 3, 4}
    assert all(levels[0] == 1.0 and levels == sorted(levels, reverse=True) and levels[-1] > 0 for levels in drawn)
    last = torch.tensor([levels[-1] for levels in drawn if len(levels) == 4])
    assert last.mean().item() == pytest.approx(0.25, abs=0.02)  # the least of three uniform draws


# --- gradients and schedules --------------------------------------------------------------------------------------


def test_each_loss_reaches_its_own_part_alone():
    teacher = Gaussian()  # trainable here: even so no gradient may reach it
    student, fake = Gaussian(), Gaussian()
    method = dmd(teacher=teacher, student=student, fake=fake)
    loss, _ = method.compute_student_loss(batch_of())
    loss.backward()
    assert student.offset.grad is not None
    assert fake.offset.grad is None
    assert teacher.offset.grad is None

    student.offset.grad = None
    loss, _ = method.trainables[1].loss(batch_of())
    loss.backward()
    assert fake.offset.grad is not None
    assert student.offset.grad is None
    assert teacher.offset.grad is None


def test_trainables_follow_from_the_terms():
    def parts(method):
        return [(part.name, part.updates_per_step, part.start_step) for part in method.trainables]

    assert parts(dmd()) == [("student", 1, 0), ("fake_score", 3, 0)]
    assert parts(dmd(dm=0.0)) == [("student", 1, 0)]
    late = Piecewise({0: 0.0, 4: 1.0})
    assert parts(dmd(ca=late, dm=late)) == [("student", 1, 4), ("fake_score", 3, 0)]
    assert parts(dmd(ca=late, dm=late, more=1.0, start_step=2)) == [("student", 1, 0), ("fake_score", 3, 2)]


def test_terms_of_weight_0_are_not_computed():
    """Until CA and DM have a weight, the student's loss is its trajectory MSE alone."""
    teacher, student = Gaussian().requires_grad_(False), Gaussian(offset=0.5)
    late = Piecewise({0: 0.0, 2: 1.0})
    method = dmd(ca=late, dm=late, more=1.0, teacher=teacher, student=student)
    drawn = batch_of()
    states = teacher_trajectory(teacher, drawn.noise, list(LEVELS), 1, SHIFT, drawn.prompts)
    batch = DistillBatch(drawn.noise, drawn.prompts, states)
    calls = len(teacher.calls)
    method.before_step(1)
    loss, metrics = method.compute_student_loss(batch)
    torch.testing.assert_close(loss, sum(trajectory_mse(student, batch, method.sampler.sigmas)))
    assert set(metrics) == {"trajectory_mse"}
    assert len(teacher.calls) == calls
    method.before_step(2)
    assert {"cfg_aug_abs", "dm_abs", "trajectory_mse"} <= method.compute_student_loss(batch)[1].keys()


def test_weight_schedule_scales_the_direction():
    """Half way up a linear ramp CA moves the student half as far."""
    deltas = []
    for weight in (1.0, Ramp(0.0, 1.0, 0, 10)):
        method = dmd(ca=weight, dm=0.0)
        method.before_step(5)
        torch.manual_seed(0)
        loss, _ = method.compute_student_loss(batch_of())
        deltas.append(loss.item() ** 0.5)  # the loss is half the squared length
    assert deltas[1] == pytest.approx(0.5 * deltas[0], rel=1e-4)


# --- training ---------------------------------------------------------------------------------------------------


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


def test_dm_alone_brings_the_student_to_the_teacher():
    torch.manual_seed(0)
    student, fake = Gaussian(offset=1.5), Gaussian(offset=1.5)
    train(dmd(ca=0.0, student=student, fake=fake))
    assert abs(student.offset.item()) < 0.25
    assert fake.offset.item() == pytest.approx(student.offset.item(), abs=0.3)


def test_ca_drives_along_the_guidance_and_dm_holds_it():
    """With the null prompt's mean below, guidance pulls up: CA alone diverges, with DM it settles near the teacher."""
    offsets = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        student = Gaussian()
        train(dmd(dm=weight, alpha=1.2, null_mean=0.0, student=student))
        offsets[weight] = student.offset.item()
    assert offsets[0.0] > 2.0
    assert 0.0 < offsets[1.0] < 0.6 * offsets[0.0]


def test_fake_score_moves_to_the_student_by_its_share():
    student, fake = Gaussian(offset=4.0), Gaussian(offset=0.0)
    dmd(ema_to_student=0.25, student=student, fake=fake).after_step(1)
    assert fake.offset.item() == pytest.approx(1.0)
    assert student.offset.item() == 4.0
