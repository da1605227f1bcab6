"""Samplers, stochastic steps and their log-probabilities, against closed forms."""

import math

import pytest
import torch
from gaussian import SHAPE, Gaussian, prompts_of

from fewstep.core import flow
from fewstep.core.samplers import (
    euler_step,
    iterate,
    last_state,
    normal_log_prob,
    sample_euler,
    sde_mean_std,
    sde_step,
)
from fewstep.methods.dmd.rollout import backward_simulation

SIGMAS = flow.get_sigmas(4, 3.0)


def test_euler_converges_to_the_exact_flow():
    """The flow of a Gaussian ends at mean + deviation * noise."""
    model, prompts = Gaussian(deviation=0.5), prompts_of([1.0, -2.0])
    noise = torch.randn(2, *SHAPE)
    expected = prompts.features.reshape(2, 1, 1, 1) + 0.5 * noise
    errors = []
    for steps in (16, 256):
        errors.append((sample_euler(model, noise, flow.get_sigmas(steps, 3.0), prompts) - expected).abs().max().item())
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 8  # first order: 16 times the steps, about a sixteenth of the error


def test_sde_sampler_ends_on_data_with_the_right_mean():
    torch.manual_seed(0)
    model, prompts = Gaussian(deviation=0.01), prompts_of([0.7])
    noise = torch.randn(1, 2, 32, 32)
    out = last_state(noise, iterate(model, noise, SIGMAS, prompts, sampler="sde"))
    assert out.mean().item() == pytest.approx(0.7, abs=0.01)
    assert out.std().item() < 0.02  # no noise left


def test_sde_step_preserves_coefficients_at_every_eta():
    torch.manual_seed(0)
    x0, eps, fresh = (torch.randn(1, 2, 128, 128) for _ in range(3))
    sigma, sigma_next = 0.8, 0.5
    x, velocity = flow.add_noise(x0, sigma, eps), eps - x0
    for eta in (0.0, 0.3, 1.0):
        made = sde_step(x, sigma, sigma_next, velocity, fresh, eta).x
        noise = (made - 0.5 * x0) / 0.5
        assert noise.std().item() == pytest.approx(1.0, abs=0.02)
        assert (noise * fresh).mean().item() == pytest.approx(math.sin(eta * math.pi / 2), abs=0.02)


@pytest.mark.parametrize("sigma_next", [0.5, 0.0])
def test_sde_step_at_eta_0_equals_eulers(sigma_next):
    x, velocity, fresh = (torch.randn(3, *SHAPE) for _ in range(3))
    made = sde_step(x, 0.8, sigma_next, velocity, fresh, 0.0)
    torch.testing.assert_close(made.x, euler_step(x, 0.8, sigma_next, velocity))
    assert made.std == 0
    assert made.log_prob is None


def test_sde_step_equals_its_published_form():
    """arXiv 2509.05952: mean (1-s') x0 + s' cos(eta pi/2) eps, standard deviation s' sin(eta pi/2)."""
    x, velocity, fresh = (torch.randn(3, *SHAPE) for _ in range(3))
    sigma, sigma_next, eta = 0.9, 0.6, 0.9
    x0, eps = x - sigma * velocity, x + (1 - sigma) * velocity
    made = sde_step(x, sigma, sigma_next, velocity, fresh, eta)
    torch.testing.assert_close(made.mean, 0.4 * x0 + 0.6 * math.cos(eta * math.pi / 2) * eps)
    assert made.std == pytest.approx(0.6 * math.sin(eta * math.pi / 2))
    torch.testing.assert_close(made.x, made.mean + made.std * fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_prob_equals_torchs_normal(dtype):
    x, velocity, fresh = (torch.randn(3, *SHAPE).to(dtype) for _ in range(3))
    made = sde_step(x, 0.9, 0.6, velocity, fresh, 0.7)
    expected = torch.distributions.Normal(made.mean.float(), made.std).log_prob(made.x.float())
    assert made.log_prob is not None
    assert made.log_prob.dtype == torch.float32
    torch.testing.assert_close(made.log_prob, expected.mean(dim=(1, 2, 3)))


def test_log_prob_has_a_policy_gradient():
    """The sample is a constant: d/dmean of -(x - mean)^2 / (2 std^2), not zero as through x = mean + std * noise."""
    x, fresh = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    velocity = torch.randn(2, *SHAPE, requires_grad=True)
    made = sde_step(x, 0.9, 0.6, velocity, fresh, 0.7)
    assert made.log_prob is not None
    (found,) = torch.autograd.grad(made.log_prob.sum(), velocity)
    coefficient = -0.4 * 0.9 + 0.6 * math.cos(0.7 * math.pi / 2) * (1 - 0.9)  # of the velocity in the mean
    torch.testing.assert_close(found, coefficient * fresh / made.std / 8)


def test_log_prob_of_a_kept_sample_under_another_denoiser():
    old, new, prompts = Gaussian(), Gaussian(offset=0.3), prompts_of([0.5, -0.5])
    steps = list(iterate(old, torch.randn(2, *SHAPE), SIGMAS, prompts, sampler="sde", eta=0.9))
    for step in steps[:-1]:
        velocity = new(step.x, torch.full((2,), step.sigma), prompts)
        mean, std = sde_mean_std(step.x, step.sigma, step.sigma_next, velocity, 0.9)
        expected = torch.distributions.Normal(mean, std).log_prob(step.x_next).mean(dim=(1, 2, 3))
        torch.testing.assert_close(normal_log_prob(step.x_next, mean, std), expected)
        again = sde_mean_std(step.x, step.sigma, step.sigma_next, step.velocity, 0.9)
        torch.testing.assert_close(normal_log_prob(step.x_next, *again), step.log_prob, rtol=0, atol=0)


@pytest.mark.parametrize("sampler", ["euler", "sde"])
def test_terminal_step_is_deterministic_and_draws_no_noise(sampler):
    drawn = []

    def noise(x):
        drawn.append(len(x))
        return torch.randn_like(x)

    model, x = Gaussian(), torch.randn(2, *SHAPE)
    steps = list(iterate(model, x, SIGMAS, prompts_of([0.5, 1.0]), sampler=sampler, noise=noise))
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert [step.sigma for step in steps] == SIGMAS[:-1]
    assert [step.sigma_next for step in steps] == SIGMAS[1:]
    assert steps[-1].log_prob is None
    assert steps[-1].std == 0
    torch.testing.assert_close(steps[-1].x_next, steps[-1].x0)
    if sampler == "sde":
        assert drawn == [2, 2, 2]
        assert all(step.log_prob is not None and step.log_prob.shape == (2,) for step in steps[:-1])
    else:
        assert not drawn


@pytest.mark.parametrize("sampler", ["euler", "sde"])
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_iterate_stopped_early_equals_backward_simulation(sampler, stop):
    model, x, prompts = Gaussian(), torch.randn(2, *SHAPE), prompts_of([0.5, 1.0])
    torch.manual_seed(3)
    found = backward_simulation(model, x, SIGMAS[: stop + 1], prompts, sampler, 0.8)
    assert len(model.calls) == stop
    torch.manual_seed(3)
    expected = x
    for step in iterate(model, x, SIGMAS, prompts, sampler=sampler, eta=0.8):
        if step.index == stop:
            expected = step.x
            break
    assert torch.equal(found, expected)


@pytest.mark.parametrize("sampler", ["euler", "sde"])
def test_video_latents_are_sampled_like_their_frames(sampler):
    """[B, C, F, H, W]: the Gaussian denoiser is elementwise, so each frame is an image's sample."""
    video, prompts = torch.randn(2, 3, 4, 5, 6), prompts_of([0.5, 1.0])
    noises = [torch.randn_like(video) for _ in range(3)]

    def sample(x, pick):
        fresh = iter(noises)
        return list(
            iterate(Gaussian(), x, SIGMAS, prompts, sampler=sampler, eta=0.9, noise=lambda _: pick(next(fresh)))
        )

    whole = sample(video, lambda noise: noise)
    assert whole[-1].x_next.shape == video.shape
    frames = [sample(video[:, :, frame], lambda noise, frame=frame: noise[:, :, frame]) for frame in range(4)]
    torch.testing.assert_close(whole[-1].x_next, torch.stack([steps[-1].x_next for steps in frames], dim=2))
    if sampler == "sde":
        assert whole[0].log_prob is not None
        log_probs = torch.stack([steps[0].log_prob for steps in frames])
        torch.testing.assert_close(whole[0].log_prob, log_probs.mean(dim=0))
