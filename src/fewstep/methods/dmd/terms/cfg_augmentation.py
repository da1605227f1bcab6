"""CFG augmentation (CA): the direction that classifier-free guidance would add (arXiv 2511.22677, section 3).

It is the engine that turns a multi-step model into a few-step one; alone it overbakes and collapses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import Field
from torch import Tensor

from fewstep.config.base import GuidanceScale
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.registry import loss_terms
from fewstep.methods.dmd.normalize import dmd_weight
from fewstep.methods.dmd.terms.base import Direction, DirectionTerm, Renoised, TermSettings, TermSetup


def cfg_augmentation(x0_cond: Tensor, x0_null: Tensor, alpha: float) -> Tensor:
    """``(alpha - 1) (x0_teacher(prompt) - x0_teacher(null))``, to be added to the student's samples.

    Args:
        x0_cond, x0_null: [B, C, ..., H, W], the teacher's data predictions at ``x_CA`` with the prompt and the null
            prompt.
        alpha: guidance as in ``null + alpha (cond - null)``; at 1 there is nothing to add.
    """
    return (alpha - 1) * (x0_cond - x0_null)


class CFGAugmentationSettings(TermSettings):
    """Settings of CFG augmentation."""

    guidance_scale: GuidanceScale = Field(
        3.0, description="The teacher's guidance, as in x_cond + g (x_cond - x_null); 0 is none."
    )


@loss_terms.register("cfg_augmentation")
class CFGAugmentation(DirectionTerm):
    """CFG augmentation at sigma_CA."""

    Settings = CFGAugmentationSettings
    level = "ca"
    teacher_prompts = ("cond", "null")

    def __init__(self, alpha: float, eps: float) -> None:
        self.alpha, self.eps = alpha, eps

    @classmethod
    def metric_names(cls, settings: TermSettings) -> set[str]:
        return {"student/cfg_aug_abs"}

    @classmethod
    def build(cls, settings: TermSettings, setup: TermSetup) -> Self:
        assert isinstance(settings, CFGAugmentationSettings)
        return cls(settings.guidance_scale + 1, setup.config.dmd_norm_eps)

    def direction(
        self, x0: Tensor, anchor: Tensor, prompts: EncodedPrompts, renoised: Renoised, teacher: Sequence[Tensor]
    ) -> Direction:
        x0_cond, x0_null = teacher
        ca = cfg_augmentation(x0_cond, x0_null, self.alpha)
        return Direction(ca / dmd_weight(x0_cond, x0, self.eps), ca, {"cfg_aug_abs": ca.abs().mean()})
