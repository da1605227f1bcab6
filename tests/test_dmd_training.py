"""Backward simulation, gradient routing and weight schedules of DMD, and that it trains the student."""

from dataclasses import replace

import pytest
import torch
from dmd_setup import LEVELS, SHIFT, batch_of, dmd
from gaussian import SHAPE, Gaussian, prompts_of

from fewstep.config.load import load_recipe
from fewstep.core import flow
from fewstep.core.schedules import Piecewise, Ramp
from fewstep.data.batch import DistillBatch
from fewstep.data.step_depth import StepDepth
from fewstep.data.teacher_trajectories import teacher_trajectory
from fewstep.methods.dmd.rollout import backward_simulation, sample_rollout_timesteps
from fewstep.methods.dmd.student_sampler import StudentSampler
from fewstep.methods.models_setup import student_generation_config
from fewstep.methods.trajectory import trajectory_mse

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


def test_the_first_step_is_trained_as_often_as_its_weight_says():
    torch.manual_seed(0)
    for weight, share in ((0.0, 0.0), (3.0, 0.5), (1.0, 0.25)):
        alone = [len(sample_rollout_timesteps(LEVELS, "fixed", weight)) == 1 for _ in range(2000)]
        assert sum(alone) / len(alone) == pytest.approx(share, abs=0.04)
    assert sample_rollout_timesteps(LEVELS[:1], "fixed", 0.0) == [1.0]
    never = StudentSampler(Gaussian(), LEVELS, SHIFT, first_step_weight=0.0)
    assert all(float(never(batch_of()).anchor[0]) < 1 for _ in range(50))


def test_a_repeated_step_count_is_drawn_more_often(tiny):
    recipe = load_recipe("micro-any", ["student.step_counts=[1, 1, 2, 4]"])
    assert student_generation_config(recipe, tiny).step_counts == [1, 2, 4]
    sampler = StudentSampler(Gaussian(), LEVELS, SHIFT, trained_levels=recipe.student.trained_levels)
    torch.manual_seed(0)
    anchors = [float(sampler(batch_of()).anchor[0]) for _ in range(600)]
    # 1 in half of the batches, an eighth from 2, a sixteenth from 4
    assert anchors.count(1.0) / len(anchors) == pytest.approx(11 / 16, abs=0.05)


def test_a_student_of_several_step_counts_is_sampled_at_the_levels_of_each():
    counts = [1, 2, 4]
    sampler = StudentSampler(Gaussian(), LEVELS, SHIFT, trained_levels=[flow.uniform_timesteps(n) for n in counts])
    torch.manual_seed(0)
    anchors = [float(sampler(batch_of()).anchor[0]) for _ in range(600)]
    share = {level: anchors.count(level) / len(anchors) for level in set(anchors)}
    # a third of the batches each: 1; 1 and 1/2; 1, 3/4, 1/2 and 1/4
    assert share == pytest.approx({1.0: 7 / 12, 0.75: 1 / 12, 0.5: 1 / 4, 0.25: 1 / 12}, abs=0.05)
    assert sampler.sigmas == flow.sigmas_from_timesteps(LEVELS, SHIFT)  # of inference


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
    torch.testing.assert_close(loss, sum(trajectory_mse(student, batch, method.sampler.sigmas).values()))
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


def test_prompts_that_need_more_steps_are_drawn_more_at_many():
    needed = torch.tensor([1, 1, 2, 4])
    depth = StepDepth([1, 2, 4], needed)
    seen = {count: torch.zeros(4) for count in (1, 2, 4)}
    for position in range(600):
        rows = depth.rows(position, 8, seed=3)
        assert rows == depth.rows(position, 8, seed=3)
        seen[depth.steps(position, seed=3)] += torch.bincount(torch.tensor(rows), minlength=4)
    totals = {count: float(rows.sum()) / 4800 for count, rows in seen.items()}
    assert totals == pytest.approx(dict.fromkeys((1, 2, 4), 1 / 3), abs=0.05)
    weights = {1: [1, 1, 1, 1], 2: [0.25, 0.25, 1, 1], 4: [0.25, 0.25, 0.25, 1]}
    for count, each in weights.items():
        expected = torch.tensor(each) / sum(each)
        torch.testing.assert_close(seen[count] / seen[count].sum(), expected, atol=0.05, rtol=0)


def test_a_batch_with_a_number_of_steps_is_sampled_at_its_levels():
    sampler = StudentSampler(Gaussian(), LEVELS, SHIFT, trained_levels=[flow.uniform_timesteps(n) for n in (1, 2, 4)])
    anchors = {float(sampler(replace(batch_of(), steps=2)).anchor[0]) for _ in range(60)}
    assert anchors == {1.0, 0.5}
