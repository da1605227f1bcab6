"""Flow matching of a model with an adapter on the user's images (arXiv 2210.02747): what most programs do.

On a few-step model it takes the few-step ability away. With a LoRA that undoes the distillation added while training
(``training_adapter``, after ostris' for Z-Image-Turbo), and left out afterwards, it does so more slowly. On the
multi-step base there is nothing to lose; the LoRA is then used on the student.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field
from torch import Tensor, nn

from fewstep.config.lora_recipe import LoraMethodConfig, TimestepSettings
from fewstep.core.denoiser import Denoiser, flow_matching_loss
from fewstep.core.method import Trainable
from fewstep.core.registry import lora_methods
from fewstep.data.batch import DistillBatch
from fewstep.methods.lora.base import LoraMethod, LoraSetup
from fewstep.methods.lora.timesteps import draw_sigma, loss_weight


class FlowMatchingConfig(LoraMethodConfig):
    """The config section of method flow_matching."""

    name: Literal["flow_matching"]
    training_adapter: str | None = Field(
        None,
        description="LoRA file that undoes the model's distillation (fewstep lora adapter makes one): added while "
        "training, left out of previews and of the result.",
    )
    training_adapter_strength: Annotated[float, Field(gt=0, le=10)] = Field(1.0, description="Its strength.")

    @property
    def added_lora(self) -> str | None:
        return self.training_adapter

    @property
    def added_strength(self) -> float:
        return self.training_adapter_strength


FLOW_MATCHING = "error in denoising the images; noisy, falls slowly"


def weighted_flow_matching(
    denoiser: Denoiser, batch: DistillBatch, settings: TimestepSettings, shift: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted mean of the batch's flow-matching losses, and metrics: the unweighted mean."""
    sigma = draw_sigma(settings, len(batch), shift, batch.noise.device)
    each = flow_matching_loss(denoiser, batch.real, batch.noise, sigma, batch.prompts)
    return (loss_weight(settings, sigma) * each).mean(), {"unweighted_loss": each.detach().mean()}


@lora_methods.register("flow_matching")
class FlowMatchingLora(LoraMethod):
    """Trains the adapter alone.

    Args:
        shift: of the model's sampler.
    """

    def __init__(self, denoiser: nn.Module, timesteps: TimestepSettings, shift: float) -> None:
        self.denoiser, self.timesteps, self.shift = denoiser, timesteps, shift
        self.trainables = [Trainable("lora", denoiser, self.loss, loss_meaning=FLOW_MATCHING)]

    @classmethod
    def config_model(cls) -> type[FlowMatchingConfig]:
        return FlowMatchingConfig

    @classmethod
    def build(cls, setup: LoraSetup) -> Self:
        return cls(setup.models.denoiser, setup.recipe.timesteps, setup.models.model.shift)

    def loss(self, batch: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow matching on the batch's latents."""
        return weighted_flow_matching(self.denoiser, batch, self.timesteps, self.shift)
