"""Images that clients upload, checked before they are decoded."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fewstep.errors import UserError

_FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class Upload:
    """Attributes:
    image: [3, H, W] in [0, 1].
    mask: [1, H, W], 1 where the image is drawn anew; None is everywhere.
    """

    image: Tensor
    mask: Tensor | None


def read_upload(image: bytes, mask: bytes | None, size: tuple[int, int] | None, max_pixels: int) -> Upload:
    """Decode an image and its mask, and resize them.

    Args:
        mask: an image whose transparent pixels are drawn anew, as in OpenAI's API.
        size: width and height; None is the image's own size.
        max_pixels: of an upload; larger ones are refused by their headers, before they are decoded.

    Raises:
        UserError: one is no image, or too large, or the mask has no transparency or another size.
    """
    opened = _open("image", image, max_pixels)
    size = size or opened.size
    pixels = np.array(opened.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    found = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    if mask is None:
        return Upload(found, None)
    covering = _open("mask", mask, max_pixels)
    if covering.size != opened.size:
        raise UserError(f"mask: {covering.width}x{covering.height}, but the image is {opened.width}x{opened.height}")
    if not covering.has_transparency_data:
        raise UserError("mask: no transparency; the transparent pixels are those that are drawn anew")
    alpha = np.array(covering.convert("RGBA").getchannel("A").resize(size, Image.Resampling.NEAREST))
    return Upload(found, torch.from_numpy(alpha < 128)[None].float())


def _open(name: str, content: bytes, max_pixels: int) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as opened:
            if opened.width * opened.height > max_pixels:
                raise UserError(f"{name}: {opened.width}x{opened.height} has more than {max_pixels} pixels")
            return ImageOps.exif_transpose(opened)
    except UserError:
        raise
    except Exception as error:  # a damaged file raises errors of many types
        kinds = ", ".join(_FORMATS)
        raise UserError(f"{name}: cannot be read as {kinds} ({type(error).__name__})") from None
