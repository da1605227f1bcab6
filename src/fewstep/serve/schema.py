"""The bodies of requests and answers, in OpenAI's form, with extensions of our own that are marked as such."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fewstep.config.base import PlainValues, SamplingSteps
from fewstep.core.seeds import MAX_SEED, derive_seed
from fewstep.errors import UserError
from fewstep.inference.editing import STRENGTH
from fewstep.serve.loras import MAX_LORAS, MAX_STRENGTH

OutputFormat = Literal["png", "jpeg", "webp"]
LoraStrength = Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH)]
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


class GenerationRequest(PlainValues):
    """The body of ``POST /v1/images/generations``."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: Annotated[str, Field(min_length=1)]
    model: str | None = Field(None, description="The served model's name, which is also the default.")
    n: int = Field(1, ge=1, le=10, description="Images, from the seeds seed, seed + 1, ...")
    size: str = Field("auto", max_length=11, description="WIDTHxHEIGHT in pixels; auto is the model's default.")
    response_format: Literal["url", "b64_json"] = Field("b64_json", description="A URL is valid for an hour.")
    output_format: OutputFormat = "png"
    output_compression: int = Field(100, ge=0, le=100, description="Quality of jpeg and webp; 100 keeps most.")
    quality: Literal["auto"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    stream: bool = Field(False, description="Answer by server-sent events.")
    partial_images: int = Field(0, ge=0, le=3, description="Intermediate predictions of each image, in a stream.")
    user: str | None = Field(None, max_length=256, description="Kept for OpenAI's clients; not used.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Extension. Random by default; the answer has it.")
    steps: SamplingSteps | Literal["auto"] | None = Field(
        None, description="Extension. Sampling steps; auto: as many as the prompt needs; by default the model's."
    )
    negative_prompt: str = Field("", description="Extension, for models with guidance.")
    lora: dict[str, LoraStrength] = Field(
        default_factory=dict,
        max_length=MAX_LORAS,
        description="Extension. Strengths of LoRA files, by their names in GET /v1/models.",
    )
    enhance: bool = Field(False, description="Extension. Let the server's language model revise the prompt.")
    progress: bool = Field(False, description="Extension. Events of the queue and of each step, in a stream.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.size != "auto" and not _SIZE.fullmatch(self.size):
            raise ValueError("size: expected WIDTHxHEIGHT, such as 1024x1024, or auto")
        if not self.stream and (self.partial_images or self.progress):
            raise ValueError("partial_images, progress: only with stream")
        if self.stream and self.response_format == "url":
            raise ValueError("response_format: a stream has images as b64_json")
        return self

    @property
    def sides(self) -> tuple[int, int] | None:
        """Width and height; None is the model's default."""
        found = _SIZE.fullmatch(self.size)
        return (int(found[1]), int(found[2])) if found else None


class EditRequest(GenerationRequest):
    """The text fields of the form of ``POST /v1/images/edits``; ``image`` and ``mask`` are files beside them.

    ``lora`` is JSON in a text field.
    """

    size: str = Field("auto", max_length=11, description="The image is resized to it; auto is the image's own size.")
    strength: float = Field(
        STRENGTH, gt=0, le=1, description="Extension. The share of the steps that are sampled; 1 forgets the image."
    )

    @field_validator("lora", mode="before")
    @classmethod
    def _parse_lora(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError('expected JSON, such as {"name": 0.8}') from None


Body = TypeVar("Body", bound=GenerationRequest)


class SafetyDecision(BaseModel):
    """Of the safety filter about an image, which is withheld if it is flagged."""

    network: str
    score: float = Field(description="Probability of pornography, in [0, 1].")
    flagged: bool


class ImageAnswer(BaseModel):
    """One image: ``b64_json`` or ``url``, or neither if it is withheld. ``seed`` and ``safety`` are extensions."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    seed: int
    safety: SafetyDecision | None = None


class ImagesAnswer(BaseModel):
    """The answer to a request for images. ``steps`` is an extension."""

    created: int
    data: list[ImageAnswer]
    output_format: OutputFormat
    size: str
    steps: int


class ErrorBody(BaseModel):
    """OpenAI's form of an error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The answer to a request that failed."""

    error: ErrorBody


_BRANCH = re.compile(r"constrained-int|literal\[.*\]")  # pydantic's names of the kinds that a value may have


def describe_errors(errors: Sequence[Any]) -> tuple[str, str | None]:
    """One line for pydantic's errors, and the field that it is about."""
    first = min(errors, key=lambda one: one["type"] != "extra_forbidden")
    parts = [str(part) for part in first["loc"] if part != "body" and not _BRANCH.fullmatch(str(part))]
    where = " ".join(".".join(parts).split())[:200]
    problem = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        problem = f"there is no such field; there are {', '.join(GenerationRequest.model_fields)}"
    elif first["type"] == "json_invalid":
        where, problem = "", "the body is not valid JSON"
    line = f"{where}: {problem}" if where else problem
    return line.encode("utf-8", "replace").decode(), where.encode("utf-8", "replace").decode() or None


def seeded(body: Body, key: str | None) -> Body:
    """A body whose seed, where it has none, depends on the request's ``Idempotency-Key`` alone.

    Args:
        key: None leaves the body as it is.
    """
    if key is None or body.seed is not None:
        return body
    return body.model_copy(update={"seed": derive_seed("idempotency key", key)})


def check_limits(prompts: Sequence[str], limit: int) -> None:
    """Raises: UserError for a prompt of too many characters, before it is tokenized."""
    for prompt in prompts:
        if len(prompt) > limit:
            raise UserError(f"prompt: {len(prompt)} characters; at most {limit} are allowed")
