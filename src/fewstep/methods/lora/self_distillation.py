"""On-policy self-distillation of a LoRA on a few-step model (after D-OPSD, arXiv 2605.05204).

The student is trained at states of its own few-step rollouts, towards an EMA copy of itself that is given more. In the
paper the copy sees the target image through a vision-language encoder, whose language weights are the student's.
Without one it is given the target's latent: its data prediction is moved part of the way to it. The weight ``sigma^2``
of the velocities' distance makes it that of the data predictions, as in the paper's code. The paper takes all steps of
a rollout; here one is drawn for each update, which has the same expectation at the memory of one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.config.lora_recipe import LoraMethodConfig, LoraRecipe
from fewstep.core.denoiser import Denoiser, predict_x0
from fewstep.core.method import Trainable
from fewstep.core.registry import lora_methods
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.student_sampler import StudentSampler
from fewstep.methods.lora.base import LoraMethod, LoraSetup
from fewstep.methods.lora.models_setup import COPY


class SelfDistillationConfig(LoraMethodConfig):
    """The config section of method self_distillation."""

    name: Literal["self_distillation"]
    vision_language_model: str | None = Field(
        None,
        description="Folder of a Qwen3-VL of the text encoder's size, through which the copy sees the image; null "
        "shows it the latent alone.",
    )
    reference_weight: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="How far the copy's data prediction is moved to the target's latent; 1 is the latent itself. null "
        "is 0.25, or not at all where the copy sees the image.",
    )
    copy_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.99, description="EMA decay of the copy, by update. The paper has 0.9999 in long runs."
    )

    @property
    def weight(self) -> float:
        """How far the data prediction is moved."""
        if self.reference_weight is not None:
            return self.reference_weight
        return 0.25 if self.vision_language_model is None else 0.0

    @property
    def image_encoder(self) -> str | None:
        return self.vision_language_model

    @property
    def copied(self) -> bool:
        return True

    @property
    def few_step_only(self) -> bool:
        return True

    def check(self, recipe: LoraRecipe) -> None:
        if self.vision_language_model is not None and recipe.data.images is None:
            raise ValueError("method.vision_language_model needs the images of a set: name one in data.images")
        if self.vision_language_model is not None and recipe.data.preservation is not None:
            raise ValueError("method.vision_language_model: it describes no images of data.preservation; leave one out")


@lora_methods.register("self_distillation")
class SelfDistillation(LoraMethod):
    """
    Args:
        sampler: samples of the student at its own steps.
        copy: the student with the averaged adapter, whose parameters are not trained.
    """

    def __init__(self, student: nn.Module, copy: nn.Module, sampler: StudentSampler, weight: float, decay: float):
        self.student, self.copy, self.sampler, self.weight, self.decay = student, copy, sampler, weight, decay
        meaning = "squared distance to the copy's predictions; a moving target"
        self.trainables = [Trainable("lora", student, self.loss, loss_meaning=meaning)]

    @classmethod
    def config_model(cls) -> type[SelfDistillationConfig]:
        return SelfDistillationConfig

    @classmethod
    def build(cls, setup: LoraSetup) -> Self:
        config, models = setup.recipe.method, setup.models
        assert isinstance(config, SelfDistillationConfig)
        sampling = models.model.generation_config
        levels, shift = models.student_levels(), models.model.shift
        sampler = StudentSampler(models.denoiser, levels, shift, "fixed", sampling.sampler, sampling.eta)
        copy = models.teacher_denoisers[COPY]
        return cls(models.denoiser, copy, sampler, config.weight, config.copy_decay)

    def loss(self, batch: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean squared distance of the data predictions at one state of the student's rollout."""
        sample = self.sampler(batch)
        with torch.no_grad():
            target = privileged_x0(self.copy, sample.z, sample.sigma, batch, self.weight)
        return (sample.x0.float() - target).square().mean(), {}

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float]:
        for own, live in zip(self.copy.parameters(), self.student.parameters(), strict=True):
            own.lerp_(live, 1 - self.decay)
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.copy.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, parameter in self.copy.named_parameters():
            parameter.copy_(state[name])


def privileged_x0(copy: Denoiser, z: Tensor, sigma: Tensor, batch: DistillBatch, weight: float) -> Tensor:
    """The copy's data prediction at ``z``, with the batch's privileged prompts where it has them, moved by ``weight``
    to its latents: [B, C, ..., H, W], fp32."""
    prompts = batch.prompts if batch.privileged is None else batch.privileged
    return predict_x0(copy, z, sigma, prompts).float().lerp(batch.real.float(), weight)
