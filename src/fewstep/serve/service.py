"""From a request's body to its images: the part of the server between HTTP and the scheduler."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from fewstep.core.seeds import image_seed
from fewstep.errors import UserError
from fewstep.inference.edit_input import EditInput
from fewstep.inference.enhancer import Enhancer
from fewstep.inference.image_extras import Extras, UsedLora
from fewstep.inference.image_metadata import ImageMetadata
from fewstep.inference.params import SamplingParams
from fewstep.models.editor import ImageEditor
from fewstep.models.lora.targets import LoraTargets
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.serve.drawing import DrawingEngine
from fewstep.serve.edit_engine import EditEngine
from fewstep.serve.engine import Engine
from fewstep.serve.images import ImageStore
from fewstep.serve.jobs import Drawn, Event, Failed, Request, Upload
from fewstep.serve.loras import LoraFolder
from fewstep.serve.metrics import Metrics
from fewstep.serve.safety import SafetyFilter
from fewstep.serve.scheduler import QueueFull, Scheduler
from fewstep.serve.schema import EditRequest, GenerationRequest, SafetyDecision, check_limits
from fewstep.serve.settings import ServeSettings

log = logging.getLogger("fewstep.serve")


class UnknownModel(Exception):
    """Another model than the served one is wanted."""


class Ticket:
    """A submitted request, and its events in the event loop."""

    def __init__(
        self, service: Service, client: str, prompt: str, params: SamplingParams, seeds: tuple[int, ...]
    ) -> None:
        self.service, self.loop = service, asyncio.get_running_loop()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        resolved = service.engine.resolve(prompt, params)
        self.request = Request(client, prompt, params, resolved, seeds, 0, self._emit)
        self.deadline = self.loop.time() + service.settings.timeout
        self.original_prompt: str | None = None  # where the prompt was revised

    @property
    def revised_prompt(self) -> str | None:
        return None if self.original_prompt is None else self.request.prompt

    def _emit(self, event: Event) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    async def next(self, seconds: float | None = None) -> Event | None:
        """The next event; None if there is none for so long.

        Raises:
            TimeoutError: the request's time is over.
            Exception: the request failed.
        """
        left = self.deadline - self.loop.time()
        if left <= 0:
            raise TimeoutError
        try:
            async with asyncio.timeout(left if seconds is None else min(left, seconds)):
                event = await self.events.get()
        except TimeoutError:
            if self.loop.time() >= self.deadline:
                raise
            return None
        if isinstance(event, Failed):
            raise event.error
        return event

    async def images(self) -> list[Tensor]:
        """All images, uint8 [H, W, 3] each. Errors as for :meth:`next`."""
        images: dict[int, Tensor] = {}
        while len(images) < len(self.request.seeds):
            event = await self.next()
            if isinstance(event, Drawn):
                images[event.index] = event.image
        return [images[index] for index in range(len(images))]

    def cancel(self) -> None:
        """Nobody waits any more; without effect on what is done."""
        self.service.scheduler.cancel(self.request)

    def metadata(self, index: int) -> str:
        """What an image was made with, for its file."""
        service, request = self.service, self.request
        used = tuple(
            UsedLora(path=name, fingerprint=service.loras.fingerprint(name), strength=strength)
            for name, strength in request.loras
        )
        return ImageMetadata.of(
            service.name,
            service.fingerprint,
            request.prompt,
            request.resolved,
            request.seeds[index],
            service.dtype,
            service.extras.model_copy(update={"loras": used, "original_prompt": self.original_prompt}),
        ).dump()


class Service:
    """One model, its queue and its metrics.

    Args:
        name: of the model in the API.
        fingerprint: of the model's folder (:func:`fewstep.models.fingerprint.model_fingerprint`).
        dtype: that was given when the model was loaded.
        loras: files that requests may name; None has none.
        enhancer: revises prompts where requests want it.
        safety_filter: decides about every image before it is sent.
        extras: of all images.
    """

    def __init__(
        self,
        pipeline: TextToImagePipeline | ImageEditor,
        name: str,
        fingerprint: str,
        settings: ServeSettings,
        dtype: str | None = None,
        loras: LoraFolder | None = None,
        enhancer: Enhancer | None = None,
        safety_filter: SafetyFilter | None = None,
        extras: Extras | None = None,
    ) -> None:
        self.loras, self.extras = loras or LoraFolder(None, LoraTargets({}, None)), extras or Extras()
        self.enhancer, self.safety_filter = enhancer, safety_filter
        self._revisions, self._revising = 0, ThreadPoolExecutor(1, "fewstep revise")
        self.name, self.fingerprint, self.dtype, self.settings = name, fingerprint, dtype, settings
        self.created, self.ready = int(time.time()), False
        self.metrics = Metrics(lambda: self.scheduler.queued)
        self.editor = pipeline if isinstance(pipeline, ImageEditor) else None
        if isinstance(pipeline, ImageEditor):
            self.engine: DrawingEngine = EditEngine(pipeline, self.metrics.batch)
        else:
            self.engine = Engine(pipeline, self.loras, settings.max_batch, self.metrics.batch)
        self.scheduler = Scheduler(self.engine, settings.max_queue)
        self.store: ImageStore | None = ImageStore()  # of images with a URL; None: the gateway has it
        self.config = pipeline.generation_config
        self.multiple = pipeline.latent_multiple
        self.max_pixels = settings.max_pixels or 4 * self.config.height * self.config.width
        self.negative_prompts = self.config.guidance_scale > 0 and not self.config.guidance_distilled

    def start(self) -> None:
        """Start to draw: first one image with the defaults, which allocates what later ones need and measures the
        speed."""

        def emit(event: Event) -> None:
            self.ready = isinstance(event, Drawn) or self.ready

        params = SamplingParams()
        upload = self.engine.warm_up_upload()
        warm_up = Request("", "", params, params.resolved(self.config), (0,), 0, emit, upload)
        self.scheduler.submit(warm_up)
        self.scheduler.start()

    async def revise(self, body: GenerationRequest) -> str:
        """The prompt of a body, revised if it wants that and the enhancer could; one is revised at a time.

        Raises:
            UserError: it is beyond a limit, or there is no enhancer.
            QueueFull: too many prompts wait.
            TimeoutError: the request's time is over.
        """
        if not body.enhance:
            return body.prompt
        if self.enhancer is None:
            raise UserError("enhance: this server has no language model for it")
        check_limits([body.prompt], self.settings.max_prompt)
        if self._revisions >= self.settings.max_queue:
            raise QueueFull(self.enhancer.seconds)
        self._revisions += 1
        try:
            work = asyncio.get_running_loop().run_in_executor(self._revising, self.enhancer, body.prompt)
            revision = await asyncio.wait_for(work, self.settings.timeout)
        finally:
            self._revisions -= 1
        fits = len(revision.prompt) <= self.settings.max_prompt
        if revision.problem is not None or not fits:
            problem = {"problem": revision.problem} if self.settings.log_prompts else {}  # it may quote the prompt
            log.warning(json.dumps({"event": "prompt not revised", **problem}))
        return revision.prompt if fits else body.prompt

    async def decide(self, image: Tensor) -> SafetyDecision | None:
        """The safety filter's decision about an image, uint8 [H, W, 3]; None without one."""
        return None if self.safety_filter is None else await asyncio.to_thread(self.safety_filter, image)

    def submit(self, body: GenerationRequest, client: str, prompt: str, upload: Upload | None = None) -> Ticket:
        """Queue a request.

        Args:
            prompt: the body's, or a revised one. upload: of an edit; an image to begin from has its result's size.

        Raises:
            UserError: it is beyond a limit, or the model cannot draw it.
            UnknownModel: it names another model.
            QueueFull: too many images wait.
        """
        params, loras = self.params(body, self._sides(body, upload)), self.loras.check(body.lora)
        if body.steps == "auto":
            if upload is not None:
                raise UserError("steps: auto; an edit needs a number of steps")
            steps = min(self.engine.choose_steps(prompt), self.settings.max_steps)
            params = params.model_copy(update={"steps": steps})
        if isinstance(body, EditRequest) and isinstance(upload, EditInput):
            params = params.model_copy(update={"strength": body.strength})
        ticket = Ticket(self, client, prompt, params, self.seeds(body))
        ticket.original_prompt = None if prompt == body.prompt else body.prompt
        ticket.request.previews, ticket.request.upload = body.partial_images, upload
        ticket.request.loras = loras
        self.scheduler.submit(ticket.request)
        return ticket

    def _sides(self, body: GenerationRequest, upload: Upload | None) -> tuple[int, int] | None:
        """Width and height of an edit; None is the model's default. Raises: UserError where the model needs images."""
        if isinstance(upload, EditInput):
            return upload.image.shape[2], upload.image.shape[1]
        if self.editor is None:
            return None
        if upload is None:
            raise UserError("image: this model edits images by instruction; send them to /v1/images/edits")
        return body.sides or self.editor.family.default_size(upload[-1], self.multiple)

    def params(self, body: GenerationRequest, sides: tuple[int, int] | None = None) -> SamplingParams:
        """The sampling parameters of a body, of an image of these sides (width, height) if given. Errors as for
        :meth:`submit`."""
        settings = self.settings
        if body.model is not None and body.model != self.name:
            raise UnknownModel(f"model: this server has {self.name!r}, not {body.model[:100]!r}")
        check_limits([body.prompt, body.negative_prompt], settings.max_prompt)
        if body.n > settings.max_images:
            raise UserError(f"n: {body.n} images; at most {settings.max_images} are allowed")
        steps = None if body.steps == "auto" else body.steps
        if steps is not None and steps > settings.max_steps:
            raise UserError(f"steps: {steps}; at most {settings.max_steps} are allowed")
        if body.negative_prompt and not self.negative_prompts:
            raise UserError("negative_prompt: this model has no guidance, which a negative prompt needs; leave it out")
        width, height = sides or body.sides or (self.config.width, self.config.height)
        if width * height > self.max_pixels:
            raise UserError(f"size: {width}x{height} has more than {self.max_pixels} pixels, which is the limit")
        if width % self.multiple or height % self.multiple:
            raise UserError(f"size: {width}x{height}: both sides must be multiples of {self.multiple}")
        return SamplingParams(steps=steps, width=width, height=height, negative_prompt=body.negative_prompt)

    def seeds(self, body: GenerationRequest) -> tuple[int, ...]:
        """The seed of each image."""
        first = secrets.randbelow(2**32) if body.seed is None else body.seed
        return tuple(image_seed(first, index) for index in range(body.n))

    def describe(self) -> dict[str, Any]:
        """The model as ``GET /v1/models`` lists it; all but the first four are
        extensions."""
        config, settings = self.config, self.settings
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "fewstep",
            "loras": self.loras.names,
            "enhancer": self.enhancer is not None,
            "edits": "from an image" if self.editor is None else "by instruction",
            "defaults": {"steps": config.steps, "width": config.width, "height": config.height},
            "limits": {
                "max_pixels": self.max_pixels,
                "multiple": self.multiple,
                "max_images": settings.max_images,
                "max_steps": settings.max_steps,
                "max_prompt": settings.max_prompt,
                "negative_prompt": self.negative_prompts,
            },
        }


async def until(ticket: Ticket, seconds: float) -> AsyncIterator[Event | None]:
    """The events of a request up to its last image, and None whenever there was none for so long. Errors as for
    :meth:`Ticket.next`."""
    left = len(ticket.request.seeds)
    while left:
        event = await ticket.next(seconds)
        left -= isinstance(event, Drawn)
        yield event
