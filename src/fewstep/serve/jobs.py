"""What the server draws: a request's images, and what its client is told."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from fewstep.inference.edit_input import EditInput
from fewstep.inference.params import ResolvedParams, SamplingParams
from fewstep.serve.loras import Chosen

#: An image to begin from, or images to edit by instruction.
Upload = EditInput | tuple[Image.Image, ...]


@dataclass(frozen=True)
class Progress:
    """A step of one image is done; ``preview`` is uint8 [H, W, 3] where one was wanted after this step."""

    index: int
    step: int
    steps: int
    preview: Tensor | None = None
    preview_index: int = 0


@dataclass(frozen=True)
class Drawn:
    """One image is done: uint8 [H, W, 3]."""

    index: int
    image: Tensor


@dataclass(frozen=True)
class Failed:
    """The request gets no more images."""

    error: Exception


Event = Progress | Drawn | Failed

_numbers = itertools.count()


@dataclass(eq=False)
class Request:
    """The images of one request, one for each seed.

    Attributes:
        client: the name of its API key; clients share the server fairly.
        params: of all images, but for their seeds.
        resolved: the same with the model's defaults.
        previews: intermediate predictions wanted of each image.
        upload: the images of an edit.
        loras: the adapters to draw with.
        emit: receives events, in the drawing thread; must not block.
        cancelled: nobody waits for the images any more.
    """

    client: str
    prompt: str
    params: SamplingParams
    resolved: ResolvedParams
    seeds: tuple[int, ...]
    previews: int
    emit: Callable[[Event], None]
    upload: Upload | None = None
    loras: Chosen = ()
    cancelled: bool = False
    number: int = field(default_factory=lambda: next(_numbers))
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    finished: float | None = None

    @property
    def shape(self) -> Hashable:
        """Images of one shape can be drawn together: they differ in prompt and seed alone."""
        kind = self.upload.mask is None if isinstance(self.upload, EditInput) else None
        return self.resolved.model_dump_json(exclude={"seed", "seeds", "batch_size"}), kind, self.loras

    @property
    def cost(self) -> float:
        """Of one image: pixels times evaluations of the transformer, which its time is about proportional to."""
        return (
            self.resolved.height * self.resolved.width * self.resolved.steps * (1 + (self.resolved.guidance_scale > 0))
        )

    def fail(self, error: Exception) -> None:
        """The first error of a request is its answer; its other images are not drawn."""
        if not self.cancelled:
            self.cancelled = True
            self.emit(Failed(error))


@dataclass(frozen=True)
class Job:
    """One image of a request."""

    request: Request
    index: int

    @property
    def seed(self) -> int:
        return self.request.seeds[self.index]


def preview_steps(steps: int, count: int) -> list[int]:
    """After which steps, from 1, ``count`` previews are shown: evenly spaced, never the last step, which is the
    image."""
    wanted = {round((index + 1) * steps / (count + 1)) for index in range(count)}
    return sorted(step for step in wanted if 0 < step < steps)
