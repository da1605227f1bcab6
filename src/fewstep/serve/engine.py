"""Draws a batch of the server's images with the model, as `fewstep generate` draws them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence

import torch

from fewstep.core.batching import max_batch_size
from fewstep.core.device import is_out_of_memory
from fewstep.data.images import to_uint8
from fewstep.inference.editing import SourceImages, encode_edits, first_step
from fewstep.inference.generate import GenerationCancelled, GenerationStep, generate
from fewstep.inference.params import ResolvedParams, SamplingParams
from fewstep.models.lora.swap import LoraSwap
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.serve.jobs import Drawn, Job, Progress, preview_steps
from fewstep.serve.loras import Chosen, LoraFolder


class OutOfMemory(Exception):
    """A single image does not fit into the memory."""


class Engine:
    """One model. All but ``resolve`` is called in one thread.

    Args:
        loras: that requests may name.
        max_batch: images drawn together; None fits two million pixels.
        observe: told the number of images of each batch and its seconds.
    """

    def __init__(
        self,
        pipeline: TextToImagePipeline,
        loras: LoraFolder,
        max_batch: int | None = None,
        observe: Callable[[int, float], None] = lambda images, seconds: None,
    ) -> None:
        self.pipeline, self.max_batch, self.observe = pipeline, max_batch, observe
        self.loras, self._swap = loras, LoraSwap(pipeline.transformer)
        self._merged: Chosen | None = ()  # what the weights hold; None after an error
        # its own tokenizers: those of the tokenizers library must not be used in two threads at once
        family, components = pipeline.family, dict(pipeline.components)
        components |= {n: copy.deepcopy(components[n]) for n in family.prompt_components if n in family.others}
        self._encoder = family.prompt_encoder(components, pipeline.generation_config.system_prompt)
        self._fits: dict[object, int] = {}  # batches that fitted into the memory, by shape

    def resolve(self, prompt: str, params: SamplingParams) -> ResolvedParams:
        """The parameters with the model's defaults. Raises: UserError for what the model cannot draw."""
        resolved = params.resolved(self.pipeline.generation_config)
        self.pipeline.latent_shape(resolved.height, resolved.width)
        if resolved.strength is not None:
            first_step(resolved.steps, resolved.strength)
        self._encoder.check([prompt, resolved.negative_prompt], system=resolved.system_prompt)
        return resolved

    def batch_limit(self, job: Job) -> int:
        """Images of this one's shape that are drawn together."""
        limit = self.max_batch or max_batch_size(job.request.resolved.height, job.request.resolved.width)
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
        start, request = time.monotonic(), jobs[0].request
        for job in jobs:
            job.request.started = job.request.started or start
        self._merge(request.loras)
        seeds = tuple(job.seed for job in jobs)
        params = request.params.model_copy(update={"seeds": seeds, "batch_size": len(jobs)})
        prompts = [job.request.prompt for job in jobs]
        made = generate(
            self.pipeline, prompts, params, lambda step: self._report(jobs, step), self._encode_uploads(jobs)
        )
        seconds = time.monotonic() - start
        self.observe(len(jobs), seconds)
        for job, image in zip(jobs, made.images, strict=True):
            job.request.finished = time.monotonic()
            if not job.request.cancelled:
                job.request.emit(Drawn(job.index, image))

    def _merge(self, chosen: Chosen) -> None:
        """Have these adapters in the weights. Raises: UserError for a file that has changed."""
        if chosen == self._merged:
            return
        loras = self.loras.get(chosen)
        self._merged = None
        self._swap.set(loras)
        self._merged = chosen

    def _encode_uploads(self, jobs: Sequence[Job]) -> SourceImages | None:
        uploads = [job.request.upload for job in jobs if job.request.upload is not None]
        return encode_edits(self.pipeline, uploads) if uploads else None

    def _report(self, jobs: Sequence[Job], step: GenerationStep) -> bool:
        """False, which cancels the batch, when nobody waits for any of its images."""
        waiting = [(row, job) for row, job in enumerate(jobs) if not job.request.cancelled]
        for row, job in waiting:
            shown = preview_steps(step.steps, job.request.previews)
            if step.step in shown:
                (preview,) = to_uint8(self.pipeline.decode(step.x0[row : row + 1])).cpu()
                event = Progress(job.index, step.step, step.steps, preview, shown.index(step.step))
            else:
                event = Progress(job.index, step.step, step.steps)
            job.request.emit(event)
        return bool(waiting)
