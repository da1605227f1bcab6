"""Shields: what keeps the spear from over-baking the student's images.

Distribution matching is a direction, and part of the algorithm in ``dmd.py``. The others are losses on the student's
images, which can be added to it or stand in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.core import flow
from fewstep.core.denoiser import Denoiser, FeatureExtractor
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.trajectory import trajectory_mse


def distribution_matching(x0_teacher: Tensor, x0_fake: Tensor) -> Tensor:
    """``x0_teacher(prompt) - x0_fake(prompt)`` at ``x_DM``: from where the student's images are denser than the
    teacher's to where they are rarer (DMD, arXiv 2311.18828, eq. 7; the DM term of arXiv 2511.22677).

    Args:
        x0_teacher, x0_fake: [B, C, H, W], data predictions of both at the same noisy images.
    """
    return x0_teacher - x0_fake


def downsample(x: Tensor, factor: int) -> Tensor:
    """[B, C, H, W] -> [B, C, H / factor, W / factor], means over squares: what distribution matching sees of a latent
    at a coarser scale (after scale-wise distillation, arXiv 2503.16397). Noise is added after it, so that its level is
    what it says.
    """
    return F.avg_pool2d(x, factor)


def upsample_grad(delta: Tensor, factor: int) -> Tensor:
    """A direction for shrunken images as one for the images: the gradient, up to size, that goes through ``shrink``."""
    return delta.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


class LossTerm(Protocol):
    """A loss on the student's images."""

    @property
    def name(self) -> str:
        """Names its metric, and its trainable if it has one."""
        ...

    @property
    def wants_real(self) -> bool:
        """Whether batches must bring real latents."""
        ...

    def loss(self, x: Tensor, batch: DistillBatch) -> Tensor:
        """Student's images [B, C, H, W] with gradient, and the batch they are of -> scalar."""
        ...


@runtime_checkable
class TrainableTerm(LossTerm, Protocol):
    """A shield with a network of its own that learns along."""

    @property
    def module(self) -> nn.Module:
        """What learns."""
        ...

    def learn(self, x: Tensor, batch: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of ``module`` on the student's images without gradient, and metrics."""
        ...


def mean_variance(x: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """``mean_i 1/2 [ (s_i^2 + (m_i - m*)^2) / s*^2 - 1 - log(s_i^2 / s*^2) ]`` (arXiv 2511.22677, eq. 7).

    The divergence of each sample's own Gaussian (mean m_i and deviation s_i over its elements) from the target's.

    Args:
        x: [B, C, H, W].
        mean, std: the targets m* and s*.
    """
    flat = x.flatten(1)
    variance = flat.var(dim=1, correction=0).clamp(min=1e-8)
    ratio = variance / std**2
    return 0.5 * (ratio + (flat.mean(dim=1) - mean).square() / std**2 - 1 - ratio.log()).mean()


class MeanVarianceTerm:
    """The mean-variance shield: stable, knows nothing of what an image shows."""

    name, wants_real = "mean_variance", False

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std = mean, std

    def loss(self, x: Tensor, batch: DistillBatch) -> Tensor:
        return mean_variance(x, self.mean, self.std)


class TrajectoryMSETerm:
    """DMD's regression (arXiv 2311.18828, eq. 9, on latents): what the student makes of a noise should be what the
    teacher made of the same noise. A student of several steps is held all along its way, see ``trajectory.astray``.

    Args:
        sigmas: the student's noise levels from 1 to the terminal 0.
    """

    name, wants_real = "regression", True

    def __init__(self, student: Denoiser, sigmas: Sequence[float]) -> None:
        self.student, self.sigmas = student, sigmas

    def loss(self, x: Tensor, batch: DistillBatch) -> Tensor:
        return torch.stack(trajectory_mse(self.student, batch, self.sigmas)).sum()


def feature_mmd(a: Tensor, b: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two batches of features [B, D], unbiased; three Gaussian kernels around the
    median distance (Gretton et al. 2012, eq. 3)."""
    both = torch.cat([a, b])
    distance = torch.cdist(both, both).square()
    median = distance.detach()[~torch.eye(len(both), dtype=torch.bool, device=both.device)].median().clamp(min=1e-12)
    kernel = torch.stack([torch.exp(-distance / (scale * median)) for scale in (0.5, 1.0, 2.0)]).mean(dim=0)
    n = len(a)

    def within(block: Tensor) -> Tensor:
        return (block.sum() - block.diagonal().sum()) / (n * (n - 1))

    return within(kernel[:n, :n]) + within(kernel[n:, n:]) - 2 * kernel[:n, n:].mean()


class FeatureMMDTerm:
    """The MMD shield: batches of the student's and of real images should look alike to the teacher's middle layer.

    Args:
        together: this process's rows of a batch -> the whole batch's, with gradient.
    """

    name, wants_real = "mmd", True

    def __init__(
        self, extractor: FeatureExtractor, renoise: Renoise, together: Callable[[Tensor], Tensor] = lambda rows: rows
    ) -> None:
        self.extractor, self.renoise, self.together = extractor, renoise, together

    def loss(self, x: Tensor, batch: DistillBatch) -> Tensor:
        sigma = self.renoise.sample_sigma(x)
        eps = torch.randn_like(x)
        seen = [
            self.together(self.extractor.features(flow.add_noise(images, sigma, eps), sigma, batch.prompts).mean(dim=1))
            for images in (x, batch.real)
        ]
        return feature_mmd(seen[0], seen[1].detach())
