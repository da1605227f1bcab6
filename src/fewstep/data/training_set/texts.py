"""Text in images, such as watermarks, found by RapidOCR, which is optional."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

from fewstep.errors import UserError

_EDGE = 1024  # pixels of the longest edge that text is looked for at
_LEAST_CHARACTERS = 2  # edges are sometimes taken for a single one

#: An image -> the texts in it.
FindText = Callable[[Image.Image], list[str]]


def open_text_finder(least_confidence: float) -> FindText:
    """A function that reads the texts in an image with at least this confidence.

    Raises:
        UserError: RapidOCR is not installed.
    """
    try:
        from rapidocr import RapidOCR
    except ImportError:
        raise UserError("--check-text: needs the rapidocr package; pip install rapidocr") from None
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)
    engine: Any = RapidOCR(params={"Global.log_level": "error"})
    one_at_a_time = Lock()

    def find(image: Image.Image) -> list[str]:
        small = image.copy()
        small.thumbnail((_EDGE, _EDGE))
        with one_at_a_time:
            found = engine(np.asarray(small)[:, :, ::-1])
        texts = zip(found.txts or (), found.scores or (), strict=True)
        return [text for text, score in texts if score >= least_confidence and len(text.strip()) >= _LEAST_CHARACTERS]

    return find
