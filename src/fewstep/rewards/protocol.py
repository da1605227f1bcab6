"""Protocols of scorers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


class Scorer(Protocol):
    """Scores images for their prompts. ``core.registry.scorers`` holds scorers by name."""

    name: str

    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """One or several scores of each image: key -> float [N], NaN where the score does not apply to the prompt.

        Args:
            images: uint8 [N, H, W, 3].
            prompts: N prompts.
        """
        ...


@runtime_checkable
class Classifier(Scorer, Protocol):
    """A scorer that names the content of an image and has a measured accuracy."""

    @property
    def accuracy(self) -> dict[str, float]:
        """The mean of each of its scores on real images, and "images", the number of these."""
        ...

    def predictions(self, images: Tensor) -> list[str]:
        """The name of each image's content. images: uint8 [N, H, W, 3]."""
        ...


@runtime_checkable
class Grouped(Protocol):
    """A scorer whose scores are also reported for groups of prompts."""

    def group(self, prompt: str) -> str | None:
        """The group of a prompt, such as its language; None is no group."""
        ...
