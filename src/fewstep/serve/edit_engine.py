"""Draws the server's edits by instruction, as `fewstep generate --edit` draws them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from PIL import Image
from torch import Tensor

from fewstep.inference.edit_input import EditInput
from fewstep.inference.instruction import check_supported, edit_images
from fewstep.inference.params import ResolvedParams, SamplingParams
from fewstep.models.editor import ImageEditor
from fewstep.serve.drawing import DrawingEngine
from fewstep.serve.jobs import Job, Upload


class EditEngine(DrawingEngine):
    """A model that edits images by instruction. Images are drawn one at a time."""

    def __init__(
        self, editor: ImageEditor, observe: Callable[[int, float], None] = lambda images, seconds: None
    ) -> None:
        super().__init__(observe)
        self.editor = editor
        # its own tokenizer: those of the tokenizers library must not be used in two threads at once
        self._components = {**editor.components, "tokenizer": copy.deepcopy(editor.components["tokenizer"])}

    def resolve(self, prompt: str, params: SamplingParams) -> ResolvedParams:
        resolved = params.resolved(self.editor.generation_config)
        self.editor.latent_shape(resolved.height, resolved.width)
        check_supported(resolved)
        for text in (prompt, resolved.negative_prompt):
            self.editor.family.check_instruction(self._components, text)
        return resolved

    def warm_up_upload(self) -> Upload:
        config = self.editor.generation_config
        return (Image.new("RGB", (config.width, config.height)),)

    def largest_batch(self, job: Job) -> int:
        return 1

    def make(self, jobs: Sequence[Job]) -> Tensor:
        (job,) = jobs
        request = job.request
        images = () if request.upload is None or isinstance(request.upload, EditInput) else request.upload
        params = request.params.model_copy(update={"seed": job.seed})
        made = edit_images(self.editor, [request.prompt], images, params, lambda step: self.report(jobs, step))
        return made.images

    def decode(self, latents: Tensor) -> Tensor:
        return self.editor.family.decode_latents(self.editor.components["vae"], latents)
