"""How often the emoji reward prefers the right image, and the sharp one; its card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.atomic import write_text
from fewstep.core import seeds
from fewstep.emoji.dataset import BACKGROUNDS, NUM_TEMPLATES, STYLES, EmojiDataset, EmojiSpec
from fewstep.emoji.degrade import blur
from fewstep.emoji.reward_net import EmojiRewardNet
from fewstep.evaluation.images import as_float
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.pipeline import load

#: Specs -> images [N, 3, 64, 64] in [0, 1].
Render = Callable[[list[EmojiSpec]], Tensor]


def measure_reward(
    net: EmojiRewardNet, dataset: EmojiDataset, render: Render | None = None, count: int = 400, seed: int = 0
) -> dict[str, float]:
    """Shares of held-out combinations whose right image scores above another one, for the prompt of the right one.

    object, style, background: the other image differs in this alone. blur_1, blur_2: it is blurred by so many pixels.
    blurred_over_wrong: the blurred right image (2 px) against the sharp one of another object.

    Args:
        count: combinations, half of them of the validation split, half of the test split.
        render: real images by default; with a generator's, the preferences are those among its images.
    """
    generator = seeds.generator("reward quality", seed)
    specs = dataset.sample(count, "validation", seed)[: count // 2] + dataset.sample(count, "test", seed)[: count // 2]
    prompts = [dataset.prompt(spec, index % NUM_TEMPLATES) for index, spec in enumerate(specs)]
    draw: Render = render or (lambda some: dataset.render(some, generator))

    def other(options: list[str], present: str) -> str:
        rest = [one for one in options if one != present]
        return rest[int(torch.randint(len(rest), (), generator=generator))]

    styles = list(dict.fromkeys(spec.style for spec in specs)) if render else list(STYLES)
    shift = 1 + torch.randint(len(dataset.objects) - 1, (len(specs),), generator=generator)
    wrong = {
        "object": [
            replace(spec, object=(spec.object + int(by)) % len(dataset.objects))
            for spec, by in zip(specs, shift, strict=True)
        ],
        "style": [replace(spec, style=other(styles, spec.style)) for spec in specs],
        "background": [replace(spec, background=other(list(BACKGROUNDS), spec.background)) for spec in specs],
    }
    right = draw(specs)
    score = _scores(net, prompts)
    best = score(right)
    others = {name: score(draw(changed)) for name, changed in wrong.items()}
    blurred = {size: score(blur(right, torch.full((len(right),), float(size)))) for size in (1, 2)}
    preferred = {name: best > scores for name, scores in others.items()}
    preferred |= {f"blur_{size}": best > scores for size, scores in blurred.items()}
    preferred["blurred_over_wrong"] = blurred[2] > others["object"]
    return {name: round(float(hits.float().mean()), 4) for name, hits in preferred.items()} | {"images": len(specs)}


def model_images(model: str, steps: int | None) -> Render:
    """A function that samples a model's images of specs: its own guidance scale, another seed for each image.

    Args:
        steps: None: the model's own number.
    """
    pipeline, dataset = load(model, "cpu"), EmojiDataset.load()
    first = 0

    def render(specs: list[EmojiSpec]) -> Tensor:
        nonlocal first
        prompts = [dataset.prompt(spec, index % NUM_TEMPLATES) for index, spec in enumerate(specs)]
        images = generate(pipeline, prompts, SamplingParams(steps=steps, seed=first)).images
        first += len(specs)
        return as_float(images)

    return render


#: Keys of the figures, and what the right image is compared with.
COMPARED = {
    "object": "another object",
    "style": "another style",
    "background": "another background color",
    "blur_1": "itself, blurred by 1 px",
    "blur_2": "itself, blurred by 2 px",
}


def write_card(folder: Path, description: Mapping[str, Any], parameters: int) -> Path:
    """README.md beside a reward's files, with the figures in its description."""
    preferred: Mapping[str, Mapping[str, float]] = description["preferred"]
    heads = [f"{name} ({figures['images']})" for name, figures in preferred.items()]
    rows = [
        f"| {text} | " + " | ".join(f"{100 * figures[key]:.1f}%" for figures in preferred.values()) + " |"
        for key, text in COMPARED.items()
    ]
    last = " | ".join(f"{100 * figures['blurred_over_wrong']:.1f}%" for figures in preferred.values())
    student = description.get("student")
    ranked = f"\nIt learned to score the images of `{student}` below real ones of the same prompts." if student else ""
    card = f"""# The emoji reward

A contrastive image-text model for training students of the emoji dataset: the reward `emoji`. Its score is the cosine
of the image's and the prompt's embedding, in [-1, 1], with gradient to the image. Prompts of other forms score NaN.
{parameters:,} parameters in fp16; images of other sizes than 64 px are resized. Made by
`fewstep emoji train micro-reward` in {description["steps"]:,} steps of {description["batch_size"]} images.

It was trained on the training combinations alone, and shares no weights, architecture, seed or augmentations with the
emoji classifier. The classifier measures; this is trained on. Never report this score as a result.{ranked}

How often the right image scores above the other one, for the prompt of the right one, on held-out combinations (number
of images in brackets). Half of these combinations are validation prompts, half test prompts.

| compared with | {" | ".join(heads)} |
|---|{"---|" * len(heads)}
{chr(10).join(rows)}

The right image, blurred by 2 px, scores above the sharp one of another object in: {last}.

License: Apache-2.0. Training images: Noto (Apache-2.0), Twemoji (CC-BY-4.0), Fluent (MIT).
"""
    write_text(folder / "README.md", card)
    return folder / "README.md"


def _scores(net: EmojiRewardNet, prompts: list[str]) -> Callable[[Tensor], Tensor]:
    with torch.no_grad():
        text = torch.cat([net.text(prompts[i : i + 64]) for i in range(0, len(prompts), 64)])

    @torch.no_grad()
    def score(images: Tensor) -> Tensor:
        embedded = torch.cat([net.image(part) for part in images.split(64)])
        return (embedded * text).sum(1)

    return score
