"""The settings that an evaluation compares: a model, its number of steps, its guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.config.sections import check_label
from fewstep.errors import UserError
from fewstep.inference.params import SamplingParams
from fewstep.models.components import resolve_model
from fewstep.models.generation_config import GenerationConfig
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
    model: TextToImagePipeline,
    teacher: TextToImagePipeline | None = None,
    many: int = TEACHER_STEPS,
    compare: Mapping[str, TextToImagePipeline] | None = None,
) -> list[Setting]:
    """A student beside its teacher at many steps and, without and with guidance, at the student's few; or one alone.
    The model itself is the last.

    Args:
        compare: further models by label, each with its own steps and guidance.

    Raises:
        UserError: one of these makes images of another size.
    """
    config = model.generation_config
    others = [_compared(label, each, model) for label, each in (compare or {}).items()]
    if teacher is None:
        if config.guidance_distilled:
            return [*others, Setting(f"student_{config.steps}", model, config.steps, 0.0)]
        return [*others, Setting(f"teacher_{many}", model, many, config.guidance_scale)]
    few, best = config.steps, teacher.generation_config.guidance_scale
    return [
        Setting(f"teacher_{many}", teacher, many, best),
        Setting(f"teacher_{few}", teacher, few, 0.0),
        Setting(f"teacher_{few}_guided", teacher, few, best),
        *others,
        Setting(f"student_{few}", model, few, 0.0),
    ]


def parse_compared(specs: Sequence[str]) -> dict[str, Path]:
    """The folders of models by label, from "LABEL=MODEL".

    Raises:
        UserError: a label that is missing, wrong or given twice, or there is no such model.
    """
    found: dict[str, Path] = {}
    for spec in specs:
        label, equals, model = spec.partition("=")
        if not equals:
            raise UserError(f"--compare {spec}: write LABEL=MODEL")
        try:
            check_label(label)
        except ValueError as error:
            raise UserError(f"--compare {spec}: {error}") from None
        if label in found:
            raise UserError(f"--compare {spec}: another model has the label {label}")
        found[label] = resolve_model(model)
    return found


def _size(config: GenerationConfig) -> str:
    height, width, frames = config.size
    return f"{height}x{width}" + (f" and {frames} frames" if frames > 1 else "")


def _compared(label: str, other: TextToImagePipeline, model: TextToImagePipeline) -> Setting:
    config, own = other.generation_config, model.generation_config
    if config.size != own.size:
        raise UserError(
            f"{label}: it makes images of {_size(config)}, the measured model of {_size(own)}; compare models of one "
            "size"
        )
    return Setting(
        f"{label}_{config.steps}", other, config.steps, 0.0 if config.guidance_distilled else config.guidance_scale
    )
