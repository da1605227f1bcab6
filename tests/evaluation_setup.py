"""Stand-ins for models in tests of evaluations: real images, degraded as each setting would."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fewstep.config.sections import PromptSettings
from fewstep.data.images import to_uint8
from fewstep.data.prompts import open_prompts
from fewstep.emoji.dataset import EmojiDataset
from fewstep.evaluation import image_sets, kept_images
from fewstep.inference.generate import GenerationResult
from fewstep.inference.params import SamplingParams
from fewstep.models.generation_config import GenerationConfig


def model(**config: Any) -> Any:
    own = GenerationConfig(height=64, width=64, **config)
    transformer = SimpleNamespace(dtype=torch.float32)
    return SimpleNamespace(generation_config=own, device=torch.device("cpu"), transformer=transformer)


TEACHER = model(steps=50, guidance_scale=3.0, guidance_distilled=False)
STUDENT = model(steps=4, guidance_scale=0.0, guidance_distilled=True)


def emoji_prompts(count: int) -> list[str]:
    return list(open_prompts(PromptSettings()).texts("test")[:count])


@pytest.fixture
def seeds_used(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Replaces generation; returns the seeds of each call."""
    dataset = EmojiDataset.load()
    used: list[list[int]] = []

    def generate(model: Any, prompts: list[str], params: SamplingParams, callback: Any = None):
        seeds = [params.seed + i for i in range(len(prompts))]
        used.append(seeds)
        specs = [dataset.parse(prompt) or dataset.specs("train")[0] for prompt in prompts]
        images = torch.cat(
            [dataset.render([c], torch.Generator().manual_seed(s)) for c, s in zip(specs, seeds, strict=True)]
        )
        assert params.steps is not None
        if params.steps < 50:
            images = F.interpolate(F.avg_pool2d(images, 2 if model is STUDENT else 8), 64)
        return GenerationResult(to_uint8(images), params.steps * (2 if params.guidance_scale else 1), 0.5 * len(images))

    monkeypatch.setattr(image_sets, "generate", generate)
    monkeypatch.setattr(kept_images, "model_fingerprint", lambda model: repr(model.generation_config))
    return used
