"""Images as the server sends them: encoded, and for a while under a URL."""

from __future__ import annotations

import base64
import io
import secrets
import time
from collections import OrderedDict
from threading import Lock

from torch import Tensor

from fewstep.data.images import to_pil
from fewstep.outputs import image_text

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
#: In a replica's answer: its images are wanted as URLs, which the gateway has.
AS_URLS = "x-fewstep-as-urls"
_PILLOW = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


def encode_image(image: Tensor, output_format: str, compression: int = 100, text: str | None = None) -> bytes:
    """An image file.

    Args:
        image: uint8 [H, W, 3].
        compression: quality of JPEG and WebP in [0, 100]; a WebP of 100 is lossless, as PNG always is.
        text: what it was made with, kept in the file.
    """
    name, buffer = _PILLOW[output_format], io.BytesIO()
    options = {} if name == "PNG" else {"quality": compression}
    if name == "WEBP" and compression == 100:
        options = {"lossless": True}
    to_pil(image).save(buffer, name, **options, **({} if text is None else image_text(name, text)))
    return buffer.getvalue()


def to_base64(content: bytes) -> str:
    """As JSON holds bytes."""
    return base64.b64encode(content).decode("ascii")


def from_base64(text: str) -> bytes:
    """The bytes of :func:`to_base64`."""
    return base64.b64decode(text)


class ImageStore:
    """Images under names that cannot be guessed, for a limited time and up to a limited size.

    Args:
        seconds: for which an image is kept.
        capacity: bytes; beyond them the oldest images go first.
    """

    def __init__(self, seconds: float = 3600.0, capacity: int = 2**28) -> None:
        self.seconds, self.capacity = seconds, capacity
        self._kept: OrderedDict[str, tuple[float, bytes, str]] = OrderedDict()
        self._bytes, self._lock = 0, Lock()

    def add(self, content: bytes, output_format: str) -> str:
        """The name under which it can be had."""
        name = f"{secrets.token_urlsafe(16)}.{output_format}"
        with self._lock:
            self._kept[name] = time.monotonic(), content, MEDIA_TYPES[output_format]
            self._bytes += len(content)
            self._drop_old()
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """An image and its media type."""
        with self._lock:
            self._drop_old()
            found = self._kept.get(name)
        return None if found is None else found[1:]

    def _drop_old(self) -> None:
        while self._kept:
            since, content, _ = next(iter(self._kept.values()))
            if self._bytes <= self.capacity and time.monotonic() - since <= self.seconds:
                return
            self._kept.popitem(last=False)
            self._bytes -= len(content)
