"""Sampling parameters: one definition and one validation for the command line, the Python API and servers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Self

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from fewstep.config.base import BatchSize, Frames, GuidanceScale, Pixels, PlainValues, SamplingSteps, Seed
from fewstep.config.explain import explain
from fewstep.core.batching import max_batch_size
from fewstep.core.samplers import Sampler
from fewstep.core.seeds import MAX_SEED, image_seed
from fewstep.errors import UserError
from fewstep.models.generation_config import GenerationConfig
from fewstep.models.layer_cache import CacheSettings


class SamplingParams(PlainValues):
    """How images are sampled. What is None is taken from the model's generation config, see :meth:`resolved`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: SamplingSteps | None = Field(None, description="Sampling steps.")
    auto_steps: bool = Field(
        False, description="As many steps as the model's step chooser predicts for each prompt, in place of steps."
    )
    guidance_scale: GuidanceScale | None = Field(
        None, description="Guidance as in diffusers' Z-Image pipeline, cond + g (cond - null); 0 is none."
    )
    negative_prompt: str = Field("", description="Negative prompt for classifier-free guidance.")
    system_prompt: str | None = Field(None, description='System prompt before every prompt; "" is none.')
    assistant_prefix: str = Field("", description="Text placed inside <think>...</think> after the prompt.")
    cfg_normalization: float = Field(
        0.0, ge=0, description="Upper bound of the guided velocity's norm, over the conditional one's; 0 is no bound."
    )
    cfg_truncation: float = Field(1.0, ge=0, le=1, description="No guidance where 1 - sigma is larger.")
    height: Pixels | None = Field(None, description="Pixels.")
    width: Pixels | None = Field(None, description="Pixels.")
    frames: Frames | None = Field(None, description="Frames of a video; 1 is an image.")
    sampler: Sampler | None = Field(None, description="euler, or sde with fresh noise in each step.")
    eta: float | None = Field(None, ge=0, le=1, description="Share of fresh noise in each step of the sde sampler.")
    seed: Seed = Field(0, description=f"Image i starts from seed + i, and from 0 again after {MAX_SEED}.")
    seeds: tuple[Seed, ...] | None = Field(None, description="One seed for each prompt, in place of seed.")
    batch_size: BatchSize | None = Field(None, description="Images sampled together; None fits two million pixels.")
    strength: float | None = Field(
        None, gt=0, le=1, description="Of an edit: the share of the steps that are sampled; None is all, from noise."
    )
    adapters: Mapping[str, float] = Field(
        default_factory=dict, description="LoRA adapters on the transformer, by name, with their scales."
    )

    cache: str | None = Field(
        None, description="Reuse of layers between steps: first-block, interval or taylor, with :VALUE; None is none."
    )

    @field_validator("cache")
    @classmethod
    def _check_cache(cls, cache: str | None) -> str | None:
        if cache is not None:
            CacheSettings.parse(cache)
        return cache

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.auto_steps and self.steps is not None:
            raise ValueError("steps: a number or auto, not both")
        return self

    @property
    def layer_reuse(self) -> CacheSettings | None:
        """``cache``, parsed."""
        return None if self.cache is None else CacheSettings.parse(self.cache)

    def resolved(self, config: GenerationConfig) -> ResolvedParams:
        """The parameters with no value open. Automatic steps become the model's number.

        Raises:
            UserError: guidance for a guidance-distilled model.
        """
        height, width = self.height or config.height, self.width or config.width
        frames = self.frames or config.frames
        defaults = {
            "steps": config.steps,
            "guidance_scale": config.guidance_scale,
            "system_prompt": config.system_prompt,
            "sampler": config.sampler,
            "eta": config.eta,
            "height": height,
            "width": width,
            "frames": frames,
            "batch_size": max_batch_size(height, width, frames),
        }
        given = self.model_dump(exclude_none=True, exclude={"auto_steps"})
        found = ResolvedParams.model_validate(defaults | given)
        if config.guidance_distilled and found.guidance_scale > 0:
            raise UserError(
                f"guidance_scale {found.guidance_scale:g}: this model has guidance distilled into it; omit it, or set 0"
            )
        self._warn(config, found)
        return found

    def image_seeds(self, count: int) -> list[int]:
        """The seed of each of ``count`` images. Raises: UserError if ``seeds`` has another length."""
        if self.seeds is None:
            return [image_seed(self.seed, i) for i in range(count)]
        if len(self.seeds) != count:
            raise UserError(f"seeds: {len(self.seeds)} for {count} prompts; give one for each prompt")
        return list(self.seeds)

    def _warn(self, config: GenerationConfig, found: ResolvedParams) -> None:
        """Warnings about parameters without effect, or with a bad one."""
        counts = config.step_counts or [config.steps]
        if config.guidance_distilled and found.steps not in counts:
            trained = ", ".join(map(str, sorted(counts)))
            warnings.warn(
                f"this model was trained for {trained} steps, not {found.steps}: expect worse images", stacklevel=4
            )
        unused = ["negative_prompt"] if self.negative_prompt else []
        unused += ["cfg_normalization"] if self.cfg_normalization else []
        unused += ["cfg_truncation"] if self.cfg_truncation < 1 else []
        if found.guidance_scale == 0 and unused:
            warnings.warn(f"{', '.join(unused)}: no effect without guidance; set guidance_scale", stacklevel=4)
        if found.sampler == "euler" and self.eta is not None:
            warnings.warn("eta: no effect on the euler sampler; set sampler to sde", stacklevel=4)


class ResolvedParams(SamplingParams):
    """Sampling parameters of which only ``seeds`` may be None."""

    steps: SamplingSteps
    guidance_scale: GuidanceScale
    system_prompt: str
    height: Pixels
    width: Pixels
    frames: Frames
    sampler: Sampler
    eta: float
    batch_size: BatchSize

    @property
    def size(self) -> tuple[int, int, int]:
        """Height and width in pixels, and frames."""
        return self.height, self.width, self.frames


def parse_params(options: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters from options by name; ``steps`` may be "auto".

    Raises:
        UserError: an unknown option, with the nearest known one, or a value out of range.
    """
    if options.get("steps") == "auto":
        options = {**options, "steps": None, "auto_steps": True}
    try:
        return SamplingParams.model_validate(dict(options))
    except ValidationError as error:
        raise UserError(explain(error, options, SamplingParams)) from None
