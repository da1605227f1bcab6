"""Protocols of rewards, which are trained on, and of scorers, which measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class RewardInfo:
    """
    differentiable: whether its scores have a gradient with respect to the images.
    range: the least and the greatest score; infinite where there is none.
    license: of its weights, or of what it was made from.
    parameters: bytes of its weights.
    activations: bytes for each image of a scored batch at its own input size, without gradient.
    """

    differentiable: bool
    range: tuple[float, float]
    license: str
    parameters: int = 0
    activations: int = 0


class Reward(Protocol):
    """Scores images for their prompts; more is better. ``core.registry.rewards`` holds rewards by name.

    What is trained on must not measure the result: a reward is a training signal, a scorer never is.
    """

    name: str
    info: RewardInfo

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B], float32, on the images' device; with gradient to the images if ``info.differentiable``.

        Args:
            images: float [B, 3, H, W] in [0, 1].
            prompts: B prompts.
        """
        ...


@runtime_checkable
class Embedder(Protocol):
    """A reward that compares embeddings of image and prompt; a reward learned from votes can build on them."""

    def embeddings(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings of the images and of the prompts, float32 [B, D] both; with gradient to the images if the reward
        is differentiable. Arguments as for the reward."""
        ...


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
