"""What every method that trains a LoRA provides, and the models that it is built from."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Self

from fewstep.config.lora_recipe import LoraMethodConfig, LoraRecipe
from fewstep.core import flow
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.method import Method
from fewstep.models.adapters import AdapterDenoiser
from fewstep.models.pipeline import TextToImagePipeline


@dataclass(frozen=True)
class LoraModels:
    """The models of a LoRA training.

    Attributes:
        model: generates with the adapter as it is at present, and without what is only added while training.
        denoiser: trained: the same, with what is added while training.
        teacher: the method's second model, without adapters; None if it has none.
        teacher_denoisers: it with each of its adapters, by name; or the model with a copy of its adapter.
    """

    model: TextToImagePipeline
    denoiser: AdapterDenoiser
    teacher: TextToImagePipeline | None
    teacher_denoisers: dict[str, AdapterDenoiser]

    def student_levels(self) -> list[float]:
        """The model's pre-shift noise levels, from 1 down, without the terminal 0."""
        model = self.model
        config = model.generation_config
        sigmas = model.sigmas(config.steps, (config.height, config.width))
        return [flow.unshift_sigma(sigma, model.shift) for sigma in sigmas[:-1]]


@dataclass(frozen=True)
class LoraSetup:
    """What a method is built from.

    Attributes:
        null: the encoded empty prompt, a batch of one.
    """

    recipe: LoraRecipe
    models: LoraModels
    null: EncodedPrompts


class LoraMethod(Method):
    """A method that ``fewstep lora train`` can run. Register one with ``@lora_methods.register("name")``.

    Its batches are ``DistillBatch`` with the latents of images as ``real``.
    """

    @classmethod
    @abstractmethod
    def config_model(cls) -> type[LoraMethodConfig]:
        """The pydantic model of the recipe's ``method`` section, with ``name: Literal[...]``."""

    @classmethod
    @abstractmethod
    def build(cls, setup: LoraSetup) -> Self:
        """The method on its models. No file is read or written here; for ``fewstep plan`` all tensors are meta."""
