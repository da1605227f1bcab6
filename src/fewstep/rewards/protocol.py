"""What a scorer is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Scorer(Protocol):
    """Scores each image for its prompt. Registered in ``core.registry.scorers``, by its name."""

    name: str

    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Scores by their key, each float [N]; NaN where a score does not apply to a prompt.

        Args:
            images: uint8 [N, H, W, 3].
            prompts: N of them.
        """
        ...


class Classifier(Scorer, Protocol):
    """A scorer that names what an image shows, and whose own accuracy on real images was measured."""

    @property
    def accuracy(self) -> dict[str, float]:
        """Of each of its scores, the mean on real images."""
        ...

    def predictions(self, images: Tensor) -> list[str]:
        """What each image shows. images: uint8 [N, H, W, 3]."""
        ...
