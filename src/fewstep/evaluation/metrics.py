"""Distances between sets of features, and pixel statistics that show overbaked images. Pure functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)  # BT.601


def _covariance_root(features: Tensor) -> Tensor:
    """R [r, D] with R^T R = the unbiased covariance of features [N, D]; r = min(N, D)."""
    centered = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(centered, mode="r").R if len(centered) > centered.shape[1] else centered


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features are [N,D] and [M,D], got {tuple(a.shape)} and {tuple(b.shape)}")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a distance between sets needs two samples of each, got {len(a)} and {len(b)}")
    return a.double(), b.double()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared 2-Wasserstein distance of the Gaussians of features [N,D] and [M,D] (FID; Heusel et al. 2017, eq. 6).

    `|mu_a - mu_b|^2 + tr A + tr B - 2 tr (A B)^(1/2)`. With A = P^T P and B = Q^T Q the last trace is the sum of the
    at most min(N, D) singular values of P Q^T. This needs no matrix square root and no complex numbers, and it is exact
    for covariances of deficient rank. With N below or near D the value is biased upwards: it is above 0 for two samples
    of one distribution. Compare only values from sets of the same sizes.
    """
    a, b = _pair(a, b)
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(0.0, float(distance))


def mmd(a: Tensor, b: Tensor) -> float:
    """Squared maximum mean discrepancy, unbiased, kernel `(x.y/D + 1)^3` (KID; Binkowski et al. 2018, section 3).

    Features are [N, D] and [M, D]. The estimate is unbiased at any size: for sets of one distribution it is around 0,
    and negative half of the time.
    """
    a, b = _pair(a, b)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        gram = kernel(x, x)
        return (gram.sum() - gram.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def diversity(features: Tensor) -> float:
    """Mean cosine distance between the seeds of one prompt, averaged over prompts; in [0, 2].

    Cosine, not Euclidean, since oversaturated images have larger activations without being more diverse.

    Args:
        features: [P, S, D] with S >= 2 seeds.
    """
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(f"diversity needs features [P,S,D] with at least two seeds, got {tuple(features.shape)}")
    unit = F.normalize(features.double(), dim=-1)
    seeds = unit.shape[1]
    similarity = unit @ unit.transpose(1, 2)
    between = similarity.sum((1, 2)) - similarity.diagonal(dim1=1, dim2=2).sum(1)
    return float((1 - between / (seeds * (seeds - 1))).mean())


def luma(images: Tensor) -> Tensor:
    """[N, 3, H, W] in [0, 1] -> [N, H, W], BT.601 weights."""
    return torch.einsum("nchw,c->nhw", images.float(), images.new_tensor(_LUMA, dtype=torch.float32))


def saturation(images: Tensor) -> float:
    """Mean chroma, max(R, G, B) - min(R, G, B), over the pixels of [N, 3, H, W] in [0, 1]; 0 is gray, 1 is pure colors.

    It is not HSV's saturation, which is 1 for a nearly black pixel with any tint.
    """
    return float((images.amax(1) - images.amin(1)).float().mean())


def contrast(images: Tensor) -> float:
    """Standard deviation of luma within an image, averaged over [N, 3, H, W] in [0, 1]; at most 0.5."""
    return float(luma(images).flatten(1).std(1, correction=0).mean())


def hf_energy(images: Tensor) -> float:
    """Mean square of luma minus its 3x3 binomial blur, over [N, 3, H, W] in [0, 1].

    The blur ([1, 2, 1] / 4 along both axes) is zero at the Nyquist frequency: a checkerboard of amplitude a gives a^2,
    a plain area 0. The value is absolute, not relative to the contrast, which overbaking also increases.
    """
    gray = luma(images)[:, None]
    tap = torch.tensor([1.0, 2.0, 1.0], device=gray.device) / 4
    blurred = F.conv2d(F.pad(gray, (1, 1, 1, 1), mode="reflect"), torch.outer(tap, tap)[None, None])
    return float((gray - blurred).square().mean())
