"""The server's settings and limits, and the API keys."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from fewstep.config.base import Fraction, Settings
from fewstep.config.explain import explain
from fewstep.core.device import AUTO
from fewstep.errors import UserError
from fewstep.machine import reading

MIN_KEY = 16  # characters: shorter ones can be guessed
MAX_JSON = 2**18  # bytes of a body without images
MAX_UPLOAD = 2**25  # bytes of a body with images

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0.1)]
Kind = TypeVar("Kind", bound=Settings)


class ServedModel(Settings):
    """A model, and how it is opened.

    Attributes:
        model: a folder in diffusers' layout, a Hugging Face hub id, or a bundled model's name.
        dtype: of the weights: fp32, bf16 or fp8; None is the stored one.
        lora_dir: folder of the LoRA files that requests may name; not with fp8.
        vae: folder of an autoencoder in place of the model's own.
        enhancer: language model that revises prompts: "own" is the text encoder; else a folder, or "URL#MODEL".
        safety_filter: images that it scores so high are withheld; None has no filter.
    """

    model: str
    device: str = AUTO
    dtype: Literal["fp32", "bf16", "fp8", "fp16"] | None = None
    lora_dir: str | None = None
    vae: str | None = None
    enhancer: str | None = None
    safety_filter: Fraction | None = None


class ServeSettings(Settings):
    """Limits, and who may use the server.

    Attributes:
        api_keys: file of :func:`read_api_keys`; needed where other machines reach the server.
        max_queue: images that wait.
        max_batch: images drawn together; None fits two million pixels.
        max_pixels: of one image; None is four times the model's default size.
        max_images: of one request.
        max_prompt: characters.
        max_steps: sampling steps.
        timeout: seconds that a request may take, waiting included.
        drain: seconds that requests in progress have after SIGTERM.
        log_prompts: write prompts into the log.
    """

    api_keys: str | None = None
    max_queue: Count = 64
    max_batch: Count | None = None
    max_pixels: Count | None = None
    max_images: Count = 10
    max_prompt: Count = 4000
    max_steps: Count = 100
    timeout: Seconds = 300.0
    drain: Seconds = 60.0
    log_prompts: bool = False


def read_settings(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """Settings from values by name, which may be text. Raises: UserError for an unknown name or a wrong value."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(explain(error, values, kind)) from None


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ApiKeys:
    """Names of clients by key. Only digests are kept.

    Args:
        keys: {key: name}; without any, every request is the client "".
    """

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._names = {_digest(key): name for key, name in keys.items()}

    @property
    def required(self) -> bool:
        return bool(self._names)

    def client(self, authorization: str | None) -> str | None:
        """The client of an ``Authorization`` header; None where it has no valid key. The time it takes does not depend
        on how much of a key is right."""
        if not self._names:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        given, found = _digest(key.strip()), None
        for digest, name in self._names.items():
            if hmac.compare_digest(digest, given):
                found = name
        return found if scheme.lower() == "bearer" else None


def client_keys(file: str | Path | None) -> ApiKeys:
    """The keys of a file; None has no keys, and needs none. Errors as for :func:`read_api_keys`."""
    return ApiKeys({}) if file is None else read_api_keys(file)


def read_api_keys(file: str | Path) -> ApiKeys:
    """API keys from a text file: one on each line, after its client's name and a space where it has one. Empty lines
    and those that begin with # are left out.

    Raises:
        UserError: it cannot be read, or a key is too short or there twice.
    """
    with reading(file):
        content = Path(file).read_bytes()
    try:
        lines = [line.split() for line in content.decode("utf-8").splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a UTF-8 text file") from None
    keys: dict[str, str] = {}
    for number, words in enumerate(lines, 1):
        if not words or words[0].startswith("#"):
            continue
        if len(words) > 2:
            raise UserError(f"{file}: line {number} has {len(words)} words; write a name and a key, or a key")
        if len(words[-1]) < MIN_KEY:
            raise UserError(f"{file}: the key in line {number} is shorter than {MIN_KEY} characters")
        if words[-1] in keys:
            raise UserError(f"{file}: the key in line {number} is there twice")
        keys[words[-1]] = words[0] if len(words) == 2 else f"key {number}"
    if not keys:
        raise UserError(f"{file}: no keys; write one on each line")
    return ApiKeys(keys)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
