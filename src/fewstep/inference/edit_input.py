"""The image and the mask of an edit, checked before they are decoded."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps
from torch import Tensor

from fewstep.errors import UserError
from fewstep.machine import reading

MAX_PIXELS = 2**27  # of a user's own image
_FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class EditInput:
    """Attributes:
    image: [3, H, W] in [0, 1].
    mask: [1, H, W], 1 where the image is drawn anew; None is everywhere.
    """

    image: Tensor
    mask: Tensor | None


def read_edit_input(
    image: bytes,
    mask: bytes | None,
    size: tuple[int | None, int | None] = (None, None),
    max_pixels: int = MAX_PIXELS,
    names: tuple[str, str] = ("image", "mask"),
) -> EditInput:
    """Decode an image and its mask, and resize them.

    Args:
        mask: an image whose transparent pixels are drawn anew, as in OpenAI's API; in one without transparency the
            light pixels are, as in diffusers.
        size: width and height; None is the image's own.
        max_pixels: of each; larger ones are refused by their headers, before they are decoded.
        names: of the two, for messages.

    Raises:
        UserError: one is no image, or too large, or the mask has another size than the image.
    """
    opened = open_image(names[0], image, max_pixels)
    size = size[0] or opened.width, size[1] or opened.height
    pixels = np.array(opened.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    found = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    if mask is None:
        return EditInput(found, None)
    covering = open_image(names[1], mask, max_pixels)
    if covering.size != opened.size:
        sides = f"{covering.width}x{covering.height}, but the image is {opened.width}x{opened.height}"
        raise UserError(f"{names[1]}: {sides}")
    if covering.has_transparency_data:
        anew = ImageChops.invert(covering.convert("RGBA").getchannel("A"))
    else:
        anew = covering.convert("L")
    return EditInput(
        found, torch.from_numpy(np.array(anew.resize(size, Image.Resampling.NEAREST)) >= 128)[None].float()
    )


def read_edit_files(image: str, mask: str | None, size: tuple[int | None, int | None]) -> EditInput:
    """:func:`read_edit_input` of files."""
    contents = []
    for file in (image, *([] if mask is None else [mask])):
        with reading(file):
            contents.append(Path(file).expanduser().read_bytes())
    return read_edit_input(contents[0], contents[1] if mask else None, size, names=(image, mask or ""))


def open_image(name: str, content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A decoded image, turned as its EXIF data says. Raises: UserError, with the name, if it is none, or too large."""
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
