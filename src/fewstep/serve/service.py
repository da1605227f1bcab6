"""From a request's body to its images: the part of the server between HTTP and the scheduler."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from torch import Tensor

from fewstep.core.seeds import image_seed
from fewstep.errors import UserError
from fewstep.inference.image_metadata import ImageMetadata
from fewstep.inference.params import SamplingParams
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.serve.engine import Engine
from fewstep.serve.images import ImageStore
from fewstep.serve.jobs import Drawn, Event, Failed, Request
from fewstep.serve.metrics import Metrics
from fewstep.serve.scheduler import Scheduler
from fewstep.serve.schema import EditRequest, GenerationRequest, check_limits
from fewstep.serve.settings import ServeSettings
from fewstep.serve.uploads import Upload


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
        made = ImageMetadata.of(
            service.name, service.fingerprint, request.prompt, request.resolved, request.seeds[index], service.dtype
        )
        return made.dump()


class Service:
    """One model, its queue and its metrics.

    Args:
        name: of the model in the API.
        fingerprint: of the model's folder (:func:`fewstep.models.fingerprint.model_fingerprint`).
        dtype: that was given when the model was loaded.
    """

    def __init__(
        self,
        pipeline: TextToImagePipeline,
        name: str,
        fingerprint: str,
        settings: ServeSettings,
        dtype: str | None = None,
    ) -> None:
        self.name, self.fingerprint, self.dtype, self.settings = name, fingerprint, dtype, settings
        self.created, self.ready = int(time.time()), False
        self.metrics = Metrics(lambda: self.scheduler.queued)
        self.engine = Engine(pipeline, settings.max_batch, self.metrics.batch)
        self.scheduler = Scheduler(self.engine, settings.max_queue)
        self.store = ImageStore()
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
        warm_up = Request("", "", params, params.resolved(self.config), (0,), 0, emit)
        self.scheduler.submit(warm_up)
        self.scheduler.start()

    def submit(self, body: GenerationRequest, client: str, upload: Upload | None = None) -> Ticket:
        """Queue a request.

        Args:
            upload: of an edit, at the size that it is drawn in.

        Raises:
            UserError: it is beyond a limit, or the model cannot draw it.
            UnknownModel: it names another model.
            QueueFull: too many images wait.
        """
        sides = None if upload is None else (upload.image.shape[2], upload.image.shape[1])
        params = self.params(body, sides)
        if isinstance(body, EditRequest):
            params = params.model_copy(update={"strength": body.strength})
        ticket = Ticket(self, client, body.prompt, params, self.seeds(body))
        ticket.request.previews, ticket.request.upload = body.partial_images, upload
        self.scheduler.submit(ticket.request)
        return ticket

    def params(self, body: GenerationRequest, sides: tuple[int, int] | None = None) -> SamplingParams:
        """The sampling parameters of a body, of an image of these sides (width, height) if given. Errors as for
        :meth:`submit`."""
        settings = self.settings
        if body.model is not None and body.model != self.name:
            raise UnknownModel(f"model: this server has {self.name!r}, not {body.model[:100]!r}")
        check_limits([body.prompt, body.negative_prompt], settings.max_prompt)
        if body.n > settings.max_images:
            raise UserError(f"n: {body.n} images; at most {settings.max_images} are allowed")
        if body.steps is not None and body.steps > settings.max_steps:
            raise UserError(f"steps: {body.steps}; at most {settings.max_steps} are allowed")
        if body.negative_prompt and not self.negative_prompts:
            raise UserError("negative_prompt: this model has no guidance, which a negative prompt needs; leave it out")
        width, height = sides or body.sides or (self.config.width, self.config.height)
        if width * height > self.max_pixels:
            raise UserError(f"size: {width}x{height} has more than {self.max_pixels} pixels, which is the limit")
        if width % self.multiple or height % self.multiple:
            raise UserError(f"size: {width}x{height}: both sides must be multiples of {self.multiple}")
        return SamplingParams(steps=body.steps, width=width, height=height, negative_prompt=body.negative_prompt)

    def seeds(self, body: GenerationRequest) -> tuple[int, ...]:
        """The seed of each image."""
        first = secrets.randbelow(2**32) if body.seed is None else body.seed
        return tuple(image_seed(first, index) for index in range(body.n))

    def describe(self) -> dict[str, Any]:
        """The model as ``GET /v1/models`` lists it; ``defaults`` and ``limits`` are extensions."""
        config, settings = self.config, self.settings
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "fewstep",
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
