"""How often the emoji reward prefers the right image, and the sharp one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.core import seeds
from fewstep.emoji.dataset import BACKGROUNDS, NUM_TEMPLATES, STYLES, EmojiDataset, EmojiSpec
from fewstep.emoji.reward_net import EmojiRewardNet

#: Specs -> images [N, 3, 64, 64] in [0, 1].
Render = Callable[[list[EmojiSpec]], Tensor]


def measure_reward(
    net: EmojiRewardNet, dataset: EmojiDataset, render: Render | None = None, count: int = 400, seed: int = 0
) -> dict[str, float]:
    """Shares of held-out combinations whose right image scores above another one, for the prompt of the right one.

    object, style, background: the other image differs in this alone. blur_1, blur_2: it is blurred by so many pixels.
    blurred_over_wrong: the blurred right image (2 px) against the sharp one of another object.

    Args:
        render: real images by default; with a generator's, the preferences are those among its images.
    """
    from fewstep.emoji.train_reward import blur

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


def _scores(net: EmojiRewardNet, prompts: list[str]) -> Callable[[Tensor], Tensor]:
    with torch.no_grad():
        text = torch.cat([net.text(prompts[i : i + 64]) for i in range(0, len(prompts), 64)])

    @torch.no_grad()
    def score(images: Tensor) -> Tensor:
        embedded = torch.cat([net.image(part) for part in images.split(64)])
        return (embedded * text).sum(1)

    return score
