"""Any image file as upright 8-bit RGB in sRGB."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from fewstep.machine import reason

#: Endings of files that are taken for images; what cannot be opened of them is reported.
SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jp2", ".ppm"),
        *(".heic", ".heif", ".jxl"),
    }
)

_WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class Unreadable(Exception):
    """An image that cannot be used; the text is the reason."""


def open_rgb(file: Path | io.BytesIO) -> Image.Image:
    """An image file, or the content of one, as upright 8-bit RGB.

    EXIF's orientation is applied, alpha is flattened onto white, CMYK and images with a color profile are converted to
    sRGB, 16-bit gray is scaled. Of an animation it is the first frame. The file is not changed.

    Raises:
        Unreadable: it is damaged, no image, too large, or in floating point.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks about damaged metadata, and sizes below the limit
            with Image.open(file) as opened:
                opened.load()
                return _to_rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError:
        raise Unreadable("no image, or of a format that Pillow does not read here") from None
    except Image.DecompressionBombError:
        raise Unreadable(f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels") from None
    except (OSError, ValueError, SyntaxError, EOFError, OverflowError, MemoryError) as error:  # by format
        raise Unreadable(f"damaged ({reason(error)})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise Unreadable("pixels in floating point, whose range is not known; save it with 8 or 16 bits")
    if image.mode in _WIDE:
        wide = np.asarray(image).astype(np.int64)
        if wide.max(initial=0) > 255:
            wide = (wide.clip(0, 65535) + 128) // 257
        return Image.fromarray(wide.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        own = image.convert("RGBA")
        white = Image.new("RGBA", own.size, "white")
        return Image.alpha_composite(white, own).convert("RGB")
    return _in_srgb(image)


def _in_srgb(image: Image.Image) -> Image.Image:
    """By its color profile, if it has one that can be used."""
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "CMYK", "L"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            return image.convert("RGB")
        if converted is not None:
            return converted
    return image.convert("RGB")
