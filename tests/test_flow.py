"""The path, the shift, the schedules: against what Z-Image and diffusers have."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from gaussian import SHAPE, Gaussian, prompts_of

from fewstep.core import flow
from fewstep.core.samplers import euler_step, sample_euler, sample_sde, sde_step

TURBO = [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3]


def test_path_ends():
    x0, eps = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    assert torch.equal(flow.add_noise(x0, 0.0, eps), x0)
    assert torch.equal(flow.add_noise(x0, 1.0, eps), eps)


def test_velocity_and_data_are_inverse():
    x0, eps, sigma = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE), torch.tensor([0.1, 0.5, 1.0])
    x = flow.add_noise(x0, sigma, eps)
    torch.testing.assert_close(flow.x0_from_velocity(x, sigma, eps - x0), x0, atol=1e-6, rtol=0)
    torch.testing.assert_close(flow.velocity_from_x0(x, sigma, x0), eps - x0, atol=1e-5, rtol=1e-5)


def test_turbo_schedule():
    assert flow.get_sigmas(8, 3.0) == pytest.approx(TURBO, abs=5e-5)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
def test_schedule_is_what_the_pipeline_runs(steps):
    """diffusers' ZImagePipeline hands linspace(1, 1/n, n) to its scheduler, which shifts."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist())
    assert flow.get_sigmas(steps, 3.0) == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-6)
    assert scheduler.sigmas[-1] == 0


def test_shift_inverse_and_identity():
    u = torch.linspace(0, 1, 11)
    torch.testing.assert_close(flow.unshift_sigma(flow.shift_sigma(u, 3.0), 3.0), u)
    torch.testing.assert_close(flow.shift_sigma(u, 1.0), u)
    assert flow.shift_sigma(0.5, 3.0) == pytest.approx(0.75)


def test_euler_follows_the_exact_flow():
    """For a Gaussian the flow's end is known: mean + deviation * noise."""
    model, prompts = Gaussian(deviation=0.5), prompts_of([1.0, -2.0])
    noise = torch.randn(2, *SHAPE)
    expected = prompts.features.reshape(2, 1, 1, 1) + 0.5 * noise
    errors = []
    for steps in (16, 256):
        errors.append((sample_euler(model, noise, flow.get_sigmas(steps, 3.0), prompts) - expected).abs().max().item())
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 8  # first order: 16 times the steps, about a sixteenth of the error


def test_renoise_sampler_has_the_right_mean_and_ends_on_data():
    torch.manual_seed(0)
    model, prompts = Gaussian(deviation=0.01), prompts_of([0.7])
    out = sample_sde(model, torch.randn(1, 2, 32, 32), flow.get_sigmas(4, 3.0), prompts)
    assert out.mean().item() == pytest.approx(0.7, abs=0.01)
    assert out.std().item() < 0.02  # no noise left in


def test_eta_goes_from_euler_to_fresh_noise():
    """Data and noise keep their coefficients: the spread at the next level is the same for every eta."""
    torch.manual_seed(0)
    x0, eps, fresh = (torch.randn(1, 2, 128, 128) for _ in range(3))
    sigma, following = 0.8, 0.5
    x, velocity = flow.add_noise(x0, sigma, eps), eps - x0  # what a perfect denoiser would say
    for eta in (0.0, 0.3, 1.0):
        moved = sde_step(x, sigma, following, velocity, fresh, eta)
        noise = (moved - 0.5 * x0) / 0.5
        assert noise.std().item() == pytest.approx(1.0, abs=0.02)
        assert (noise * fresh).mean().item() == pytest.approx(math.sin(eta * math.pi / 2), abs=0.02)
    torch.testing.assert_close(
        sde_step(x, sigma, following, velocity, fresh, 0.0), euler_step(x, sigma, following, velocity)
    )


def test_callback_counts_steps():
    seen: list[int] = []
    sample_euler(Gaussian(), torch.randn(1, *SHAPE), flow.get_sigmas(3, 1.0), prompts_of([0.0]), callback=seen.append)
    assert seen == [0, 1, 2]
