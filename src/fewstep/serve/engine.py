"""Draws a batch of the server's images with the model, as `fewstep generate` draws them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from torch import Tensor

from fewstep.core.batching import max_batch_size
from fewstep.inference.edit_input import EditInput
from fewstep.inference.editing import SourceImages, encode_edits, first_step
from fewstep.inference.generate import generate
from fewstep.inference.params import ResolvedParams, SamplingParams
from fewstep.inference.step_chooser import chosen_steps
from fewstep.models.lora.swap import LoraSwap
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.serve.drawing import DrawingEngine
from fewstep.serve.jobs import Job
from fewstep.serve.loras import Chosen, LoraFolder


class Engine(DrawingEngine):
    """A text-to-image model.

    Args:
        loras: that requests may name.
        max_batch: images drawn together; None fits two million pixels.
        observe: as for :class:`DrawingEngine`.
    """

    def __init__(
        self,
        pipeline: TextToImagePipeline,
        loras: LoraFolder,
        max_batch: int | None = None,
        observe: Callable[[int, float], None] = lambda images, seconds: None,
    ) -> None:
        super().__init__(observe)
        self.pipeline, self.max_batch = pipeline, max_batch
        self.loras, self._swap = loras, LoraSwap(pipeline.transformer)
        self._merged: Chosen | None = ()  # what the weights hold; None after an error
        # its own tokenizers: those of the tokenizers library must not be used in two threads at once
        family, components = pipeline.family, dict(pipeline.components)
        components |= {n: copy.deepcopy(components[n]) for n in family.prompt_components if n in family.others}
        self._encoder = family.prompt_encoder(components, pipeline.generation_config.system_prompt)

    def resolve(self, prompt: str, params: SamplingParams) -> ResolvedParams:
        resolved = params.resolved(self.pipeline.generation_config)
        self.pipeline.latent_shape(*resolved.size)
        if resolved.strength is not None:
            first_step(resolved.steps, resolved.strength)
        self._encoder.check([prompt, resolved.negative_prompt], system=resolved.system_prompt)
        return resolved

    def choose_steps(self, prompt: str) -> int:
        (steps,) = chosen_steps(self.pipeline.folder, self._encoder, [prompt])
        return steps

    def warm_up_upload(self) -> None:
        return None

    def largest_batch(self, job: Job) -> int:
        return self.max_batch or max_batch_size(*job.request.resolved.size)

    def make(self, jobs: Sequence[Job]) -> Tensor:
        request = jobs[0].request
        self._merge(request.loras)
        seeds = tuple(job.seed for job in jobs)
        params = request.params.model_copy(update={"seeds": seeds, "batch_size": len(jobs)})
        prompts = [job.request.prompt for job in jobs]
        made = generate(self.pipeline, prompts, params, lambda step: self.report(jobs, step), self._source(jobs))
        return made.images

    def decode(self, latents: Tensor) -> Tensor:
        return self.pipeline.decode(latents)

    def _merge(self, chosen: Chosen) -> None:
        """Have these adapters in the weights. Raises: UserError for a file that has changed."""
        if chosen == self._merged:
            return
        loras = self.loras.get(chosen)
        self._merged = None
        self._swap.set(loras)
        self._merged = chosen

    def _source(self, jobs: Sequence[Job]) -> SourceImages | None:
        uploads = [job.request.upload for job in jobs if isinstance(job.request.upload, EditInput)]
        return encode_edits(self.pipeline, uploads) if uploads else None
