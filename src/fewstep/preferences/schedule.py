"""Which pairs of images are shown, in which order, and on which sides."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from fewstep.core.seeds import derive_seed


@dataclass(frozen=True)
class Comparison:
    """Two models' images of a prompt.

    Attributes:
        prompt: the prompt's number.
        left, right: labels of the models.
    """

    prompt: int
    left: str
    right: str


def schedule(labels: Sequence[str], prompts: int, seed: int, count: int | None = None) -> list[Comparison]:
    """Every two models on every prompt, in an order whose first comparisons are balanced over both.

    The prompts are shuffled. Each round shows every prompt once; in each block of as many prompts as there are pairs of
    models, every pair of models occurs once, in an order of the block's own, which rotates from round to round. Sides
    are random. The order depends on the labels, the number of prompts and the seed alone.

    Args:
        count: the first comparisons only; None is all of them.
    """
    pairs = list(combinations(sorted(labels), 2))
    draw = random.Random(derive_seed("order of comparisons", seed, prompts, *sorted(labels)))
    order = draw.sample(range(prompts), prompts)
    rotations = [draw.sample(pairs, len(pairs)) for _ in range(0, prompts, len(pairs))]
    found = []
    for turn in range(len(pairs)):
        for place, prompt in enumerate(order):
            block, offset = divmod(place, len(pairs))
            sides = list(rotations[block][(offset + turn) % len(pairs)])
            if derive_seed("sides of a comparison", seed, prompt, *sides) & 1:
                sides.reverse()
            found.append(Comparison(prompt, *sides))
    return found[:count]
