"""The path, the shift and the noise levels, against Z-Image's and diffusers' own."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from gaussian import SHAPE

from fewstep.core import flow

TURBO = [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0]


def test_path_runs_from_data_to_noise():
    x0, eps = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    assert torch.equal(flow.add_noise(x0, 0.0, eps), x0)
    assert torch.equal(flow.add_noise(x0, 1.0, eps), eps)


def test_velocity_and_data_are_inverse():
    x0, eps, sigma = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE), torch.tensor([0.1, 0.5, 1.0])
    x = flow.add_noise(x0, sigma, eps)
    torch.testing.assert_close(flow.x0_from_velocity(x, sigma, eps - x0), x0, atol=1e-6, rtol=0)
    torch.testing.assert_close(flow.velocity_from_x0(x, sigma, x0), eps - x0, atol=1e-5, rtol=1e-5)


def test_turbo_schedule_with_its_terminal_zero():
    assert flow.get_sigmas(8, 3.0) == pytest.approx(TURBO, abs=5e-5)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
def test_schedule_equals_the_diffusers_pipelines(steps):
    """diffusers' ZImagePipeline passes linspace(1, 1/n, n) to its scheduler, which shifts and appends the 0."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist())
    assert flow.get_sigmas(steps, 3.0) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_shift_has_an_inverse_and_an_identity():
    u = torch.linspace(0, 1, 11)
    torch.testing.assert_close(flow.unshift_sigma(flow.shift_sigma(u, 3.0), 3.0), u)
    torch.testing.assert_close(flow.shift_sigma(u, 1.0), u)
    assert flow.shift_sigma(0.5, 3.0) == pytest.approx(0.75)
