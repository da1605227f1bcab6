"""Distribution matching (DM): from where the student's samples are denser than the teacher's to where they are rarer.

DMD (arXiv 2311.18828, eq. 7), the regularizer of Decoupled-DMD (arXiv 2511.22677). The fake score is trained beside it
by flow matching on fresh student samples (two time scales: arXiv 2405.14867, section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fewstep.config.schedule import resolve_step
from fewstep.core import flow
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import Denoiser, predict_x0
from fewstep.core.method import Trainable
from fewstep.core.registry import loss_terms
from fewstep.data.batch import DistillBatch
from fewstep.errors import UserError
from fewstep.methods.dmd.cold_start import DynaDGSettings, guidance_share
from fewstep.methods.dmd.monitor import fake_score_loss_ratio
from fewstep.methods.dmd.normalize import dmd_weight
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.terms.base import Direction, DirectionTerm, Renoised, TermSettings, TermSetup
from fewstep.models.adapters import AdapterDenoiser

if TYPE_CHECKING:
    from fewstep.config.recipe import Stage
    from fewstep.methods.dmd.config import DMDConfig


def distribution_matching(x0_teacher: Tensor, x0_fake: Tensor) -> Tensor:
    """``x0_teacher(prompt) - x0_fake(prompt)`` at ``x_DM``.

    Args:
        x0_teacher, x0_fake: [B, C, ..., H, W], data predictions of both at the same noisy samples.
    """
    return x0_teacher - x0_fake


def downsample(x: Tensor, factor: int) -> Tensor:
    """[B, C, H, W] -> [B, C, H / factor, W / factor], means over squares (after scale-wise distillation,
    arXiv 2503.16397). Noise is added after it, so that its level is right."""
    return F.avg_pool2d(x, factor)


def upsample_grad(delta: Tensor, factor: int) -> Tensor:
    """A direction for downsampled samples as one for the samples: the gradient through ``downsample``, up to scale."""
    return delta.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


class DistributionMatchingSettings(TermSettings):
    """Settings of distribution matching."""

    scales: dict[Annotated[int, Field(ge=2)], Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="Distribution matching at downsampled latents besides: factor -> weight relative to the term's.",
    )
    dyna_dg: DynaDGSettings | None = Field(
        None, description="DynaDG: the real score begins between teacher and fake score (DMDR); null is off."
    )

    def check(self, stage: Stage, method: DMDConfig) -> None:
        """DynaDG adds the fake score's adapter to the teacher, which full copies do not have."""
        if self.dyna_dg is None:
            return
        if stage.models.train != "lora":
            raise ValueError(
                "method.terms.distribution_matching.dyna_dg needs the fake score as an adapter on the teacher: set "
                "models.train: lora, or leave it out"
            )
        if resolve_step(self.dyna_dg.steps, stage.train.steps) < 1:
            raise ValueError("method.terms.distribution_matching.dyna_dg.steps: it must last at least 1 step")


@loss_terms.register("distribution_matching")
class DistributionMatching(DirectionTerm):
    """
    Args:
        student: the trained denoiser, which the fake score may follow.
        sample: batch -> fresh student samples x0, without gradient.
        scales: factor -> weight of downsampled latents.
        eps: lower bound of the per-sample normalizer.
        updates, start_step: of the fake score; see ``Trainable``.
        ema_to_student: share by which the fake score's weights move to the student's after each step.
        guidance: step -> scale of the fake score's adapter in the real score (DynaDG); the fake score is one then.
    """

    Settings = DistributionMatchingSettings
    level = "dm"
    teacher_prompts: tuple[Literal["cond", "null"], ...] = ("cond",)
    trainable_names = model_names = ("fake_score",)

    def __init__(
        self,
        teacher: Denoiser,
        student: nn.Module,
        fake_score: nn.Module,
        renoise: Renoise,
        sample: Callable[[DistillBatch], Tensor],
        *,
        scales: Mapping[int, float] | None = None,
        eps: float = 0.1,
        updates: int = 5,
        start_step: int = 0,
        ema_to_student: float = 0.0,
        guidance: Callable[[int], float] | None = None,
    ) -> None:
        self.teacher, self.student, self.fake_score = teacher, student, fake_score
        self.renoise, self.sample, self.scales, self.eps = renoise, sample, scales or {}, eps
        self.updates, self.start_step, self.ema_to_student = updates, start_step, ema_to_student
        self.guidance, self.real_score = guidance, teacher

    @classmethod
    def metric_names(cls, settings: TermSettings) -> set[str]:
        assert isinstance(settings, DistributionMatchingSettings)
        coarse = {f"student/dm_abs_{factor}" for factor, weight in settings.scales.items() if weight}
        return {"student/dm_abs", "student/fake_score_loss_ratio"} | coarse

    @classmethod
    def build(cls, settings: TermSettings, setup: TermSetup) -> Self:
        assert isinstance(settings, DistributionMatchingSettings)
        scales = {factor: weight for factor, weight in sorted(settings.scales.items()) if weight}
        config = setup.teacher.generation_config
        rows, columns = setup.teacher.latent_shape(config.height, config.width)[-2:]
        patch = setup.teacher.family.patch_size
        for factor in scales:
            if rows % (factor * patch) or columns % (factor * patch):
                raise UserError(
                    f"method.terms.distribution_matching.scales: {rows}x{columns} latents cannot be downsampled by "
                    f"{factor} in patches of {patch}"
                )
        guidance = None
        if settings.dyna_dg is not None:
            last = resolve_step(settings.dyna_dg.steps, setup.total_steps)
            guidance = partial(guidance_share, start=settings.dyna_dg.scale, steps=last)
        dmd = setup.config
        return cls(
            *(setup.teacher.denoiser, setup.student, setup.extra["fake_score"], setup.renoise, setup.sample),
            scales=scales,
            eps=dmd.dmd_norm_eps,
            updates=dmd.fake_score_updates,
            start_step=dmd.fake_score_start_step(setup.total_steps),
            ema_to_student=dmd.fake_score_ema_to_student,
            guidance=guidance,
        )

    def before_step(self, step: int) -> None:
        """Sets the real score of this step: the teacher, whose predictions are shared with other terms, or under DynaDG
        the teacher with a part of the fake score's adapter."""
        if self.guidance is None:
            return
        scale = self.guidance(step)
        self.real_score, self.teacher_prompts = self.teacher, ("cond",)
        if scale > 0:
            assert isinstance(self.fake_score, AdapterDenoiser)
            # a tensor: compiled blocks are not compiled anew at each step
            adapters = {name: torch.tensor(scale * own) for name, own in self.fake_score.adapters.items()}
            self.real_score, self.teacher_prompts = AdapterDenoiser(self.fake_score.base, adapters), ()

    def direction(
        self, x0: Tensor, anchor: Tensor, prompts: EncodedPrompts, renoised: Renoised, teacher: Sequence[Tensor]
    ) -> Direction:
        x0_teacher = teacher[0] if teacher else predict_x0(self.real_score, renoised.x, renoised.sigma, prompts)
        x0_fake = predict_x0(self.fake_score, renoised.x, renoised.sigma, prompts)
        dm = distribution_matching(x0_teacher, x0_fake)
        delta = dm / dmd_weight(x0_teacher, x0, self.eps)
        ratio = fake_score_loss_ratio(x0_fake, x0_teacher, x0, renoised.sigma)
        metrics = {"dm_abs": dm.abs().mean(), "fake_score_loss_ratio": ratio}
        for factor, weight in self.scales.items():
            coarse = self.multiscale_dm(downsample(x0, factor), anchor, prompts)
            delta = delta + weight * upsample_grad(coarse, factor)
            metrics[f"dm_abs_{factor}"] = coarse.abs().mean()
        return Direction(delta, dm, metrics)

    def multiscale_dm(self, x0: Tensor, anchor: Tensor, prompts: EncodedPrompts) -> Tensor:
        """The normalized direction at downsampled samples, with fresh noise."""
        _, sigma = self.renoise.sample_sigmas(anchor)
        noisy = flow.add_noise(x0, sigma, torch.randn_like(x0))
        x0_teacher = predict_x0(self.real_score, noisy, sigma, prompts)
        dm = distribution_matching(x0_teacher, predict_x0(self.fake_score, noisy, sigma, prompts))
        return dm / dmd_weight(x0_teacher, x0, self.eps)

    def trainables(self) -> list[Trainable]:
        loss = self.compute_fake_score_loss
        meaning = "error in denoising the student's images; falls at first, then follows the student"
        return [Trainable("fake_score", self.fake_score, loss, self.updates, self.start_step, loss_meaning=meaning)]

    def compute_fake_score_loss(self, batch: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow matching on fresh student samples, and on downsampled ones where DM uses them."""
        x0 = self.sample(batch)
        loss = self.flow_matching_loss(x0, batch.prompts)
        for factor, weight in self.scales.items():
            loss = loss + weight * self.flow_matching_loss(downsample(x0, factor), batch.prompts)
        return loss, {}

    def flow_matching_loss(self, x0: Tensor, prompts: EncodedPrompts) -> Tensor:
        """``||velocity - (eps - x0)||^2`` of the fake score at random levels, mean over all elements."""
        sigma = self.renoise.sample_fake_sigma(x0)
        eps = torch.randn_like(x0)
        velocity = self.fake_score(flow.add_noise(x0, sigma, eps), sigma, prompts)
        return (velocity - (eps - x0)).square().mean()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if self.ema_to_student:
            for fake, student in zip(self.fake_score.parameters(), self.student.parameters(), strict=True):
                fake.lerp_(student, self.ema_to_student)
