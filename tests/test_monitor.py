"""Metrics of a DMD training where the answer is known."""

import pytest
import torch
from gaussian import SHAPE, Gaussian, prompts_of

from fewstep.core import flow
from fewstep.core.denoiser import predict_x0
from fewstep.methods.dmd.monitor import ca_dm_balance, fake_score_loss_ratio, latent_stats, relative_to


def test_loss_ratio_falls_as_the_fake_score_fits_the_student():
    """The student's samples are 2 above the teacher's: a fake score at that offset errs less than the teacher."""
    torch.manual_seed(0)
    count, prompts = 2000, prompts_of([0.0] * 2000)
    x, sigma = 2 + 0.5 * torch.randn(count, *SHAPE), torch.rand(count) * 0.9 + 0.05
    noisy = flow.add_noise(x, sigma, torch.randn_like(x))
    teacher = Gaussian()
    with torch.no_grad():
        predicted = {offset: predict_x0(Gaussian(offset=offset), noisy, sigma, prompts) for offset in (0.0, 1.0, 2.0)}
        base = predict_x0(teacher, noisy, sigma, prompts)
    ratios = [fake_score_loss_ratio(predicted[offset], base, x, sigma).item() for offset in (0.0, 1.0, 2.0)]
    assert ratios[0] == pytest.approx(1.0)
    assert ratios[0] > ratios[1] > ratios[2]
    assert ratios[2] < 0.5


def test_nyquist_energy_measures_checkerboards():
    board = torch.ones(4, 4)
    board[::2, ::2] = board[1::2, 1::2] = -1
    plain = torch.randn(1, 1, 1, 1).expand(2, 3, 4, 4) + torch.linspace(-1, 1, 4)
    assert latent_stats(board.expand(2, 3, 4, 4))["x0_nyquist"].item() == pytest.approx(1.0, rel=0.02)
    assert latent_stats(plain)["x0_nyquist"].item() == pytest.approx(0.0, abs=1e-10)
    stats = latent_stats(3 + 2 * torch.randn(8, 16, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert stats["x0_mean"].item() == pytest.approx(3, abs=0.05)
    assert stats["x0_std"].item() == pytest.approx(2, abs=0.05)
    assert stats["x0_nyquist"].item() == pytest.approx(0.25, abs=0.01)  # white noise: a quarter of its energy


def test_stats_relative_to_the_teacher():
    """Latents of twice the teacher's deviation, 1 above its mean, with an equal share of Nyquist energy."""
    teacher = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    reference = {name: float(value) for name, value in latent_stats(teacher).items()}
    found = relative_to(latent_stats(1 + 2 * teacher), reference)
    assert found["x0_std_ratio"].item() == pytest.approx(2.0, rel=1e-4)
    assert found["x0_nyquist_ratio"].item() == pytest.approx(1.0, rel=1e-4)
    assert found["x0_mean_diff"].item() == pytest.approx(1.0, abs=0.05)


def test_ca_dm_balance():
    ca = torch.randn(4, *SHAPE)
    aligned, opposed = ca_dm_balance(ca, ca / 3), ca_dm_balance(ca, -ca)
    assert aligned["ca_dm_cosine"].item() == pytest.approx(1.0, abs=1e-5)
    assert aligned["ca_dm_ratio"].item() == pytest.approx(3.0, rel=1e-5)
    assert opposed["ca_dm_cosine"].item() == pytest.approx(-1.0, abs=1e-5)
