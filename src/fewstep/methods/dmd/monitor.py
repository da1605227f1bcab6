"""Metrics of a DMD training from tensors that it computes anyway, relative to the teacher's own samples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fewstep.training.alerts import AlertRule

#: Metrics that mean trouble, and what to try.
ALERT_RULES = (
    AlertRule(
        *("student/x0_std_ratio", "above", 1.5, 50),
        "the student's variance exceeds the teacher's; raise the weight of distribution_matching, or "
        "optim.fake_score.lr",
    ),
    AlertRule(
        *("student/x0_nyquist_ratio", "above", 2.0, 50),
        "a checkerboard pattern that the teacher's samples do not have; lower cfg_augmentation.guidance_scale, or "
        "raise the weight of distribution_matching",
    ),
    AlertRule(
        *("student/fake_score_loss_ratio", "above", 0.98, 100),
        "the fake score lags behind the student; raise optim.fake_score.lr or method.fake_score_updates",
    ),
    AlertRule(
        *("student/nonfinite_skips", "above", 0.2, 20),
        "updates are not finite; lower optim.student.lr, or set train.precision=fp32",
    ),
    AlertRule(
        *("fake_score/nonfinite_skips", "above", 0.2, 20),
        "updates are not finite; lower optim.fake_score.lr, or set train.precision=fp32",
    ),
)


def fake_score_loss_ratio(x0_fake: Tensor, x0_teacher: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """The fake score's flow matching loss on fresh student samples over the teacher's on the same ones, a scalar.

    The fake score is trained on such samples and the teacher is not. Near 1 distribution matching has no signal; well
    below 1 the fake score keeps up with the student.

    Args:
        x0_fake, x0_teacher: [B, C, ..., H, W], data predictions at the same noisy samples.
        x0: [B, C, ..., H, W], the student's samples.
        sigma: [B], the noise levels; errors of x0 are those of the velocity times sigma.
    """
    weight = sigma.reshape(-1, *[1] * (x0.ndim - 1)).square().reciprocal()
    return (weight * (x0_fake - x0).square()).mean() / (weight * (x0_teacher - x0).square()).mean().clamp(min=1e-12)


def latent_stats(x0: Tensor) -> dict[str, Tensor]:
    """Mean, deviation and Nyquist energy of latents [B, C, ..., H, W]: what overbaking changes first.

    The Nyquist energy is the mean square of the checkerboard part of each 2x2 block, as a share of the variance.
    """
    checkerboard = (x0[..., ::2, ::2] - x0[..., ::2, 1::2] - x0[..., 1::2, ::2] + x0[..., 1::2, 1::2]) / 4
    variance = x0.var().clamp(min=1e-12)
    return {"x0_mean": x0.mean(), "x0_std": variance.sqrt(), "x0_nyquist": checkerboard.square().mean() / variance}


def relative_to(student: Mapping[str, Tensor], teacher: Mapping[str, float]) -> dict[str, Tensor]:
    """The student's deviation and Nyquist energy over the teacher's, and the difference of their means."""
    return {
        "x0_mean_diff": student["x0_mean"] - teacher["x0_mean"],
        "x0_std_ratio": student["x0_std"] / teacher["x0_std"],
        "x0_nyquist_ratio": student["x0_nyquist"] / max(teacher["x0_nyquist"], 1e-12),
    }


def ca_dm_balance(ca: Tensor, dm: Tensor) -> dict[str, Tensor]:
    """Cosine of CA and DM [B, C, ..., H, W], mean over samples, and the ratio of their mean magnitudes."""
    cosine = torch.cosine_similarity(ca.flatten(1), dm.flatten(1)).mean()
    return {"ca_dm_cosine": cosine, "ca_dm_ratio": ca.abs().mean() / dm.abs().mean().clamp(min=1e-12)}
