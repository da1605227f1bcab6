"""Each metric against a case whose value is known."""

from __future__ import annotations

import pytest
import torch

from fewstep.evaluation import metrics
from fewstep.evaluation.images import as_float, as_uint8


def gaussian(n: int, mean: torch.Tensor, scale: torch.Tensor, seed: int) -> torch.Tensor:
    """Samples whose mean and (diagonal) covariance are exactly ``mean`` and ``scale`` squared."""
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    whitened = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return whitened * scale + mean


@pytest.mark.parametrize("n", [6, 300])  # more dimensions than samples use the samples, fewer use a QR
def test_frechet_distance_of_two_gaussians_is_the_closed_form(n: int) -> None:
    mean, scale = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([1.0, 3.0, 0.2]).double()
    a, b = gaussian(n, torch.zeros(3).double(), torch.ones(3).double(), 0), gaussian(n, mean, scale, 1)
    expected = mean.square().sum() + (scale - 1).square().sum()  # commuting covariances: (s_a - s_b)^2 along each axis
    assert metrics.frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_matches_the_matrix_square_root_of_correlated_covariances() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(40, 5).double() @ torch.randn(5, 5).double(), torch.randn(50, 5).double()
    product = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T)).real.clamp(min=0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * product
    assert metrics.frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-8)


def test_frechet_distance_with_fewer_samples_than_dimensions() -> None:
    a = torch.randn(20, 100, generator=torch.Generator().manual_seed(0))
    assert metrics.frechet_distance(a, a) < 1e-9
    assert metrics.frechet_distance(a, a + 0.5) == pytest.approx(25.0, rel=1e-5)  # a shift of 0.5 along 100 axes


def test_mmd_is_unbiased_and_grows_with_distance() -> None:
    def draw(seed: int) -> torch.Tensor:
        return torch.randn(200, 8, generator=torch.Generator().manual_seed(seed))

    same = [metrics.mmd(draw(2 * i), draw(2 * i + 1)) for i in range(20)]
    assert abs(sum(same) / 20) < 0.01
    assert min(same) < 0 < max(same)
    near, far = metrics.mmd(draw(0), draw(1) + 0.5), metrics.mmd(draw(0), draw(1) + 1)
    assert 0.05 < near < far


def test_mmd_of_points_is_the_kernel_by_hand() -> None:
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]])
    within = (1 * 2 + 1) ** 3 + (0 * 1 + 1) ** 3
    across = ((1 * 0 + 1) ** 3 + (1 * 1 + 1) ** 3 + (2 * 0 + 1) ** 3 + (2 * 1 + 1) ** 3) / 4
    assert metrics.mmd(a, b) == pytest.approx(within - 2 * across)


@pytest.mark.parametrize("distance", [metrics.frechet_distance, metrics.mmd])
def test_distances_refuse_what_they_cannot_compare(distance) -> None:
    with pytest.raises(ValueError, match="two samples"):
        distance(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"\[N,D\]"):
        distance(torch.zeros(5, 3), torch.zeros(5, 4))


def test_diversity_counts_directions_not_lengths() -> None:
    same = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])
    orthogonal = torch.tensor([[[1.0, 0.0], [0.0, 5.0]]])
    assert metrics.diversity(same) == pytest.approx(0)
    assert metrics.diversity(orthogonal) == pytest.approx(1)
    assert metrics.diversity(torch.cat([same, orthogonal])) == pytest.approx(0.5)


def test_saturation_and_contrast_of_flat_images() -> None:
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 0.8
    assert metrics.saturation(red) == pytest.approx(0.8)
    assert metrics.saturation(torch.full((1, 3, 8, 8), 0.8)) == 0
    assert metrics.contrast(red) == pytest.approx(0, abs=1e-6)
    halves = torch.zeros(1, 3, 8, 8)
    halves[..., 4:] = 1
    assert metrics.contrast(halves) == pytest.approx(0.5)


def test_a_checkerboard_counts_in_full_and_a_plain_area_not_at_all() -> None:
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    checkerboard = ((rows + columns) % 2 * 2 - 1).float().expand(1, 3, 16, 16)
    plain = torch.full((1, 3, 16, 16), 0.5)
    slope = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    assert metrics.hf_energy(plain) == pytest.approx(0, abs=1e-9)
    assert metrics.hf_energy(plain + 0.1 * checkerboard) == pytest.approx(0.01, rel=1e-3)
    assert metrics.hf_energy(slope) < 1e-3


def test_images_go_from_either_form_to_the_other() -> None:
    pixels = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    assert torch.equal(as_uint8(as_float(pixels)), pixels)
    assert as_float(pixels).shape == (2, 3, 4, 5)
    assert as_uint8(torch.full((1, 3, 2, 2), 1.5)).max() == 255
    with pytest.raises(ValueError, match=r"\[N,H,W,3\]"):
        as_uint8(torch.zeros(2, 3, 4, 5, dtype=torch.uint8))
