"""Health metrics where the answer is known."""

import pytest
import torch
from gaussian import SHAPE, Gaussian, prompts_of

from fewstep.core import flow
from fewstep.core.denoiser import predict_x0
from fewstep.methods.dmd.monitor import ca_dm_balance, fake_score_loss_ratio, latent_stats, relative_to


def test_a_fake_that_knows_the_student_lags_less():
    """Student's images lie 2 above the teacher's: a fake that stands there errs less than one that is the teacher."""
    torch.manual_seed(0)
    count, prompts = 2000, prompts_of([0.0] * 2000)
    x, sigma = 2 + 0.5 * torch.randn(count, *SHAPE), torch.rand(count) * 0.9 + 0.05
    noisy = flow.add_noise(x, sigma, torch.randn_like(x))
    teacher = Gaussian()
    with torch.no_grad():
        told = {offset: predict_x0(Gaussian(offset=offset), noisy, sigma, prompts) for offset in (0.0, 1.0, 2.0)}
        base = predict_x0(teacher, noisy, sigma, prompts)
    lags = [fake_score_loss_ratio(told[offset], base, x, sigma).item() for offset in (0.0, 1.0, 2.0)]
    assert lags[0] == pytest.approx(1.0)
    assert lags[0] > lags[1] > lags[2]
    assert lags[2] < 0.5


def test_checkerboards_show():
    board = torch.ones(4, 4)
    board[::2, ::2] = board[1::2, 1::2] = -1
    plain = torch.randn(1, 1, 1, 1).expand(2, 3, 4, 4) + torch.linspace(-1, 1, 4)
    assert latent_stats(board.expand(2, 3, 4, 4))["x0_hf"].item() == pytest.approx(1.0, rel=0.02)
    assert latent_stats(plain)["x0_hf"].item() == pytest.approx(0.0, abs=1e-10)
    stats = latent_stats(3 + 2 * torch.randn(8, 16, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert stats["x0_mean"].item() == pytest.approx(3, abs=0.05)
    assert stats["x0_std"].item() == pytest.approx(2, abs=0.05)
    assert stats["x0_hf"].item() == pytest.approx(0.25, abs=0.01)  # noise: a quarter of it is in that corner


def test_beside_the_teacher():
    """Latents of twice the teacher's deviation, 1 above its mean; what shares of checkerboard they have stays."""
    teacher = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    looks = {name: float(value) for name, value in latent_stats(teacher).items()}
    found = relative_to(latent_stats(1 + 2 * teacher), looks)
    assert found["x0_std_over_teacher"].item() == pytest.approx(2.0, rel=1e-4)
    assert found["x0_hf_over_teacher"].item() == pytest.approx(1.0, rel=1e-4)
    assert found["x0_mean_less_teacher"].item() == pytest.approx(1.0, abs=0.05)


def test_balance():
    ca = torch.randn(4, *SHAPE)
    same, against = ca_dm_balance(ca, ca / 3), ca_dm_balance(ca, -ca)
    assert same["cosine"].item() == pytest.approx(1.0, abs=1e-5)
    assert same["ca_over_dm"].item() == pytest.approx(3.0, rel=1e-5)
    assert against["cosine"].item() == pytest.approx(-1.0, abs=1e-5)
