"""Videos in files: animated WebP, which Pillow and browsers open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from fewstep.data.images import to_pil
from fewstep.machine import reading
from fewstep.outputs import FRAME_MILLISECONDS, write_animation


def write_video(video: Tensor, file: Path, text: str | None = None) -> None:
    """Write a video, uint8 [F, H, W, 3], without loss. Arguments and errors as for ``outputs.write_animation``."""
    write_animation([to_pil(frame) for frame in video], file, text)


def read_video(file: Path, frames: int, advice: str) -> Tensor:
    """The video of so many frames that :func:`write_video` wrote, uint8 [F, H, W, 3]. Raises: UserError if the file
    cannot be read.

    Args:
        advice: what to do about such a file.
    """
    shown: list[Tensor] = []
    with reading(file, advice), Image.open(file) as animation:
        for frame in ImageSequence.Iterator(animation):
            pixels = torch.from_numpy(np.array(frame.convert("RGB")))
            # equal frames are one in the file, of a longer duration
            shown += [pixels] * max(1, round(animation.info.get("duration", 0) / FRAME_MILLISECONDS))
    return torch.stack((shown + [shown[-1]] * frames)[:frames])
