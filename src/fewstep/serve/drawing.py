"""The jobs of a batch become events: images, progress, errors; whatever model draws them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewstep.core.device import is_out_of_memory
from fewstep.data.images import to_uint8
from fewstep.errors import UserError
from fewstep.inference.generate import GenerationCancelled, GenerationStep
from fewstep.inference.params import ResolvedParams, SamplingParams
from fewstep.serve.jobs import Drawn, Job, Progress, Upload, preview_steps


class OutOfMemory(Exception):
    """A single image does not fit into the memory."""


class DrawingEngine(ABC):
    """One model. All but ``resolve`` and ``choose_steps`` is called in one thread.

    Args:
        observe: told the number of images of each batch and its seconds.
    """

    def __init__(self, observe: Callable[[int, float], None] = lambda images, seconds: None) -> None:
        self.observe = observe
        self._fits: dict[object, int] = {}  # batches that fitted into the memory, by shape

    @abstractmethod
    def resolve(self, prompt: str, params: SamplingParams) -> ResolvedParams:
        """The parameters with the model's defaults. Raises: UserError for what the model cannot draw."""

    def choose_steps(self, prompt: str) -> int:
        """The number of steps that a prompt needs. Raises: UserError if the model has no step chooser."""
        raise UserError("steps: auto; this model needs a number of steps")

    @abstractmethod
    def warm_up_upload(self) -> Upload | None:
        """What the server's first image is made from, which nobody gets."""

    @abstractmethod
    def largest_batch(self, job: Job) -> int:
        """Images of this one's shape that may be drawn together, if the memory lets them."""

    @abstractmethod
    def make(self, jobs: Sequence[Job]) -> Tensor:
        """The images of jobs of one shape, uint8 [B, H, W, 3]; calls :meth:`report` after each step."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> [B, 3, H, W] in [0, 1]."""

    def batch_limit(self, job: Job) -> int:
        """Images of this one's shape that are drawn together."""
        limit = self.largest_batch(job)
        return min(limit, self._fits.get(job.request.shape, limit))

    def draw(self, jobs: Sequence[Job]) -> None:
        """Draw jobs of one shape, and emit their events. Out of memory, the batch is halved, also in the future.

        An error is the answer of the requests in this batch.
        """
        jobs = [job for job in jobs if not job.request.cancelled]
        if not jobs:
            return
        try:
            self._draw(jobs)
        except GenerationCancelled:
            return
        except Exception as error:
            if not is_out_of_memory(error):
                for job in jobs:
                    job.request.fail(error)
                return
            half = len(jobs) // 2
        else:
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # outside the handler, whose traceback would keep the tensors
        if half == 0:
            jobs[0].request.fail(OutOfMemory("out of memory; take a smaller size"))
            return
        self._fits[jobs[0].request.shape] = half
        self.draw(jobs[:half])
        self.draw(jobs[half:])

    def _draw(self, jobs: Sequence[Job]) -> None:
        start = time.monotonic()
        for job in jobs:
            job.request.started = job.request.started or start
        images = self.make(jobs)
        self.observe(len(jobs), time.monotonic() - start)
        for job, image in zip(jobs, images, strict=True):
            job.request.finished = time.monotonic()
            if not job.request.cancelled:
                job.request.emit(Drawn(job.index, image))

    def report(self, jobs: Sequence[Job], step: GenerationStep) -> bool:
        """False, which cancels the batch, when nobody waits for any of its images."""
        waiting = [(row, job) for row, job in enumerate(jobs) if not job.request.cancelled]
        for row, job in waiting:
            shown = preview_steps(step.steps, job.request.previews)
            if step.step in shown:
                (preview,) = to_uint8(self.decode(step.x0[row : row + 1])).cpu()
                event = Progress(job.index, step.step, step.steps, preview, shown.index(step.step))
            else:
                event = Progress(job.index, step.step, step.steps)
            job.request.emit(event)
        return bool(waiting)
