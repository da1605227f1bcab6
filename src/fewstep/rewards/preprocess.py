"""The preprocessing of image encoders in torch, with gradient to the pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.errors import UserError

#: CLIP's, of the pixels of its training images (arXiv 2103.00020).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

#: "shortest": the shorter side gets the size, and the center is cut out; "longest": the longer side gets it, and black
#: bars fill the square; "both": both sides get it, whatever the proportions.
Fit = Literal["shortest", "longest", "both"]


@dataclass(frozen=True)
class Preprocess:
    """Resize, make square, normalize.

    Within 2/255 of what Pillow gives for 8-bit images, which it rounds after each of its two passes.

    Attributes:
        size: pixels per side that the encoder takes.
        edge: pixels of the side that ``fit`` names, before the center is cut out.
    """

    size: int
    edge: int
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    fit: Fit = "shortest"
    mode: Literal["bicubic", "bilinear"] = "bicubic"

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> float32 [B, 3, size, size]."""
        height, width = self._resized(*images.shape[-2:])
        images = images.float()
        # bicubic interpolation overshoots; 8-bit images cannot, not even between the two passes
        for size in ((images.shape[-2], width), (height, width)):
            if size != images.shape[-2:]:
                images = F.interpolate(images, size, mode=self.mode, antialias=True).clamp(0, 1)
        images = self._square(images)
        mean, std = (torch.tensor(each, device=images.device).view(3, 1, 1) for each in (self.mean, self.std))
        return (images - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.fit == "both":
            return self.edge, self.edge
        if self.fit == "longest":
            scale = self.edge / max(height, width)
            return round(height * scale), round(width * scale)
        # the longer side is rounded down, as torchvision and transformers do it
        short = min(height, width)
        return self.edge * height // short, self.edge * width // short

    def _square(self, images: Tensor) -> Tensor:
        """Cut out the center, or add black bars; an odd pixel is cut at the right and bottom, or added there."""
        height, width = images.shape[-2:]
        if self.fit == "longest":
            above, left = (self.size - height) // 2, (self.size - width) // 2
            return F.pad(images, (left, self.size - width - left, above, self.size - height - above))
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return images[..., top : top + self.size, left : left + self.size]


def from_processor(settings: Mapping[str, Any], where: str) -> Preprocess:
    """The preprocessing of a transformers image processor, given its ``to_dict()``.

    Raises:
        UserError: it does something that cannot be repeated here; the message names the key.
    """
    sizes = settings.get("size") or {}
    modes: dict[int, Literal["bicubic", "bilinear"]] = {2: "bilinear", 3: "bicubic"}
    mode = modes.get(int(settings.get("resample") or 3))
    if mode is None:
        raise UserError(f"{where}: resample {settings.get('resample')} of its image processor is not supported")
    fit: Fit = "shortest" if "shortest_edge" in sizes else "both"
    edge = sizes.get("shortest_edge", sizes.get("height"))
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    size = (crop or {}).get("height", sizes.get("height", edge))
    square = sizes.get("height") == sizes.get("width") and (crop or {}).get("height") == (crop or {}).get("width")
    if not edge or not size or not square or edge < size:
        raise UserError(f"{where}: size {sizes} of its image processor is not that of a square image")
    mean, std = settings.get("image_mean") or CLIP_MEAN, settings.get("image_std") or CLIP_STD
    return Preprocess(size, edge, tuple(mean), tuple(std), fit, mode)
