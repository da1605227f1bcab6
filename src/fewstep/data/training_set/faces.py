"""Faces in images, found by scikit-image's cascade of local binary patterns, which is optional.

The cascade finds upright frontal faces (its weights come with the package). It misses profiles and covered faces, and
takes a small pattern for a face now and then; ones of less than half of the largest one's width are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

from fewstep.errors import UserError

_EDGE = 512  # pixels of the longest edge that faces are looked for at
_LEAST_WIDTH = 24  # pixels, the cascade's own window
_LEAST_SHARE = 0.5  # of the largest face's width: people in the background do not count
_CLOSE_UP, _MEDIUM = 0.25, 0.11  # least face width over the image's height

#: An image -> the widths of the faces in it over the image's height, largest first.
FindFaces = Callable[[Image.Image], list[float]]


def open_face_finder() -> FindFaces:
    """A function that finds the frontal faces in an image.

    Raises:
        UserError: scikit-image is not installed.
    """
    try:
        from skimage.data import lbp_frontal_face_cascade_filename
        from skimage.feature import Cascade
    except ImportError:
        raise UserError("--check-people: needs scikit-image; pip install 'fewstep[people]'") from None
    cascade: Any = Cascade(lbp_frontal_face_cascade_filename())
    one_at_a_time = Lock()

    def find(image: Image.Image) -> list[float]:
        small = image.copy()
        small.thumbnail((_EDGE, _EDGE))
        with one_at_a_time:
            found = cascade.detect_multi_scale(
                img=np.asarray(small),
                scale_factor=1.2,
                step_ratio=1,
                min_size=(_LEAST_WIDTH, _LEAST_WIDTH),
                max_size=(_EDGE, _EDGE),
            )
        widths = sorted((face["width"] for face in found), reverse=True)
        return [width / small.height for width in widths if width >= _LEAST_SHARE * widths[0]]

    return find


def shot_of(face: float) -> str:
    """The kind of shot by the width of a face over the image's height: "close-up", "medium" or "full-body"."""
    return "close-up" if face >= _CLOSE_UP else "medium" if face >= _MEDIUM else "full-body"
