"""How a distillation is doing, from tensors that it has at hand anyway, beside some of the teacher's own images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fewstep.training.alerts import AlertRule

#: What a log of Decoupled-DMD says when something is going wrong.
ALERT_RULES = (
    AlertRule(
        *("student/x0_std_over_teacher", "above", 1.5, 50),
        "the student's variance is over the teacher's: shield too weak, or fake's lr too low?",
    ),
    AlertRule(
        *("student/x0_hf_over_teacher", "above", 2.0, 50),
        "a checkerboard that the teacher has not: spear.alpha too high, or shield too weak?",
    ),
    AlertRule("student/fake_lag", "above", 0.98, 100, "the fake does not keep up: raise optim.fake.lr or fake_updates"),
    AlertRule("student/skipped", "above", 0.2, 20, "updates are not finite: lower optim.student.lr, or precision fp32"),
    AlertRule("fake/skipped", "above", 0.2, 20, "updates are not finite: lower optim.fake.lr, or precision fp32"),
)


def fake_score_loss_ratio(x0_fake: Tensor, x0_teacher: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The fake's flow matching loss on the student's fresh images over the teacher's on the same ones, a scalar.

    The fake is trained on such images and the teacher is not: near 1 it knows no more of them than the teacher, and the
    shield is blind; well below 1 it keeps up.

    Args:
        x0_fake, x0_teacher: [B, C, H, W], data predictions at the same noisy images.
        x: [B, C, H, W], the student's images.
        sigma: [B], the noise levels; errors of the data are those of the velocity times sigma.
    """
    weight = sigma.reshape(-1, *[1] * (x.ndim - 1)).square().reciprocal()
    return (weight * (x0_fake - x).square()).mean() / (weight * (x0_teacher - x).square()).mean().clamp(min=1e-12)


def latent_stats(x: Tensor) -> dict[str, Tensor]:
    """Mean, deviation and high-frequency energy of the student's latents [B, C, H, W]: what over-baking moves first.

    The energy is the mean square of the checkerboard part of each 2x2 block, as a share of the variance.
    """
    checkerboard = (x[..., ::2, ::2] - x[..., ::2, 1::2] - x[..., 1::2, ::2] + x[..., 1::2, 1::2]) / 4
    variance = x.var().clamp(min=1e-12)
    return {"x0_mean": x.mean(), "x0_std": variance.sqrt(), "x0_hf": checkerboard.square().mean() / variance}


def relative_to(student: Mapping[str, Tensor], teacher: Mapping[str, float]) -> dict[str, Tensor]:
    """The student's deviation and high-frequency energy over the teacher's, and its mean less the teacher's."""
    return {
        "x0_mean_less_teacher": student["x0_mean"] - teacher["x0_mean"],
        "x0_std_over_teacher": student["x0_std"] / teacher["x0_std"],
        "x0_hf_over_teacher": student["x0_hf"] / max(teacher["x0_hf"], 1e-12),
    }


def ca_dm_balance(ca: Tensor, dm: Tensor) -> dict[str, Tensor]:
    """How spear and shield lie to each other: the cosine of CA and DM [B, C, H, W], and the ratio of their sizes."""
    cosine = torch.cosine_similarity(ca.flatten(1), dm.flatten(1)).mean()
    return {"cosine": cosine, "ca_over_dm": ca.abs().mean() / dm.abs().mean().clamp(min=1e-12)}
