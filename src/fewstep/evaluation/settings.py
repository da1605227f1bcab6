"""The settings that an evaluation compares: a model, its number of steps, its guidance."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.inference.params import SamplingParams
from fewstep.models.pipeline import TextToImagePipeline

TEACHER_STEPS = 50


@dataclass(frozen=True)
class Setting:
    """One way to make the images; guidance is ``cond + g (cond - null)``, 0 is none."""

    name: str
    model: TextToImagePipeline
    steps: int
    guidance_scale: float

    def params(self, seed: int) -> SamplingParams:
        """How an image is sampled; image i of a call starts from seed ``seed + i``."""
        return SamplingParams(steps=self.steps, guidance_scale=self.guidance_scale, seed=seed)

    @property
    def title(self) -> str:
        guidance = f"guidance {self.guidance_scale:g}" if self.guidance_scale else "no guidance"
        return f"{self.name.split('_')[0]}, {self.steps} {'step' if self.steps == 1 else 'steps'}, {guidance}"


def default_settings(
    model: TextToImagePipeline, teacher: TextToImagePipeline | None = None, many: int = TEACHER_STEPS
) -> list[Setting]:
    """A student beside its teacher at many steps and, without and with guidance, at the student's few; or one alone."""
    config = model.generation_config
    if teacher is None:
        if config.guidance_distilled:
            return [Setting(f"student_{config.steps}", model, config.steps, 0.0)]
        return [Setting(f"teacher_{many}", model, many, config.guidance_scale)]
    few, best = config.steps, teacher.generation_config.guidance_scale
    return [
        Setting(f"teacher_{many}", teacher, many, best),
        Setting(f"teacher_{few}", teacher, few, 0.0),
        Setting(f"teacher_{few}_guided", teacher, few, best),
        Setting(f"student_{few}", model, few, 0.0),
    ]
