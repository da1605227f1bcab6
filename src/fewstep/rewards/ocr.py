"""The reward "ocr": whether the text that a prompt quotes can be read in the image, in English and Chinese."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.data.images import to_uint8
from fewstep.errors import UserError
from fewstep.rewards.edit_distance import similarity
from fewstep.rewards.protocol import RewardInfo

#: Quoted text: straight and curved double quotes, Chinese corner brackets and book titles; single quotes only where
#: they are no apostrophes.
_QUOTED = re.compile(
    r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|「([^」]+)」|『([^』]+)』|《([^》]+)》|‘([^’]+)’(?!\w)|(?<!\w)\'([^\']+)\'(?!\w)'
)
#: Images are enlarged to so many pixels of the longer side: the detector misses letters of a few pixels.
LEAST_SIDE = 320
#: Boxes whose centers differ by less than so many of a box's heights are on one line.
SAME_LINE = 0.5
#: Least confidence of a text line: below it, the recognizer guesses at textures.
LEAST_CONFIDENCE = 0.5


class TextReader(Protocol):
    """Image uint8 [H, W, 3], RGB -> lines of text in reading order, and the confidence of each."""

    def __call__(self, image: Any) -> list[tuple[str, float]]: ...


class OCRReward:
    """1 - edit distance / length, of the text that the prompt quotes and the text that RapidOCR reads, in [0, 1].

    Case, spaces and punctuation do not count. Several quotes are one text, in their order. A prompt that quotes nothing
    wants no text: the score is then 1 of an image without any, and 0 of one with text.

    Raises:
        UserError: RapidOCR is not installed.
    """

    name = "ocr"
    info = RewardInfo(
        differentiable=False,
        range=(0.0, 1.0),
        license="Apache-2.0 (RapidOCR, PP-OCRv6 models)",
        parameters=32_000_000,
    )

    def __init__(self) -> None:
        self.read: TextReader = _rapidocr()

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores float32 [B].

        Args:
            images: [B, 3, H, W] in [0, 1].
        """
        pixels = to_uint8(images.detach().float()).numpy()
        scores = [self._score(image, prompt) for image, prompt in zip(pixels, prompts, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _score(self, image: Any, prompt: str) -> float:
        found = normalized("".join(text for text, confidence in self.read(image) if confidence >= LEAST_CONFIDENCE))
        return similarity(normalized("".join(quoted_texts(prompt))), found)


def quoted_texts(prompt: str) -> list[str]:
    """The texts in quotation marks, in order: ``a sign that reads "OPEN"`` -> ["OPEN"]."""
    return [next(text for text in match.groups() if text is not None) for match in _QUOTED.finditer(prompt)]


def normalized(text: str) -> str:
    """Letters and digits alone, folded: full-width forms, case and accents' composition do not count."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in folded if character.isalnum())


@cache
def _rapidocr() -> TextReader:
    try:
        from rapidocr import RapidOCR
    except ModuleNotFoundError as error:
        raise UserError(f"the reward ocr needs {error.name}; pip install 'fewstep[ocr]'") from None
    threads = torch.get_num_threads()
    settings = {
        "Global.log_level": "error",
        "Global.use_cls": False,  # finds upside-down lines, which no prompt wants
        "Det.limit_side_len": LEAST_SIDE,
        "EngineConfig.onnxruntime.intra_op_num_threads": threads,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    engine: Any = RapidOCR(params=settings)

    def read(image: Any) -> list[tuple[str, float]]:
        height, width = image.shape[:2]
        scale = -(-LEAST_SIDE // max(height, width))
        enlarged = np.ascontiguousarray(image.repeat(scale, 0).repeat(scale, 1)[..., ::-1])  # BGR
        output = engine(enlarged)
        if output.txts is None:
            return []
        return in_reading_order(output.boxes, list(zip(output.txts, map(float, output.scores), strict=True)))

    return read


def in_reading_order(boxes: Any, lines: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Lines sorted by row, then from left to right.

    Args:
        boxes: [N, 4, 2], the corners of each line's box, x and y in pixels.
    """
    corners = np.asarray(boxes, dtype=float)
    middle, left = corners[:, :, 1].mean(1), corners[:, :, 0].min(1)
    heights = np.ptp(corners[:, :, 1], axis=1)
    rows: list[list[int]] = []
    for index in np.argsort(middle):
        if rows and abs(middle[index] - middle[rows[-1][0]]) < SAME_LINE * heights[index]:
            rows[-1].append(int(index))
        else:
            rows.append([int(index)])
    return [lines[index] for row in rows for index in sorted(row, key=lambda one: left[one])]
