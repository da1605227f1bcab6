"""The scorer "emoji": whether an image shows the object, style and background of its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fewstep.emoji.classifier import ACCURACIES, EmojiClassifier, correct
from fewstep.emoji.dataset import EmojiDataset


class EmojiScorer:
    """The emoji classifier as an evaluation scorer. It is never a reward.

    Args:
        classifier: folder of a trained classifier; None loads the bundled one.
        device: where the classifier computes.

    Raises:
        UserError: the folder cannot be read, or its classifier has other objects than the dataset.
    """

    name = "emoji"

    def __init__(self, classifier: str | Path | None = None, device: torch.device | str = "cpu") -> None:
        self.dataset = EmojiDataset.load()
        self.classifier = EmojiClassifier.load(classifier)
        self.classifier.net.to(device)
        self.classifier.check_objects(self.dataset)

    @property
    def accuracy(self) -> dict[str, float]:
        """The classifier's own accuracy on real held-out images: object_acc, style_acc, background_acc, and images,
        the number of these."""
        return self.classifier.accuracy

    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """1 where the classifier's prediction matches the prompt, 0 where it does not, NaN where the prompt is not of
        the dataset.

        Args:
            images: uint8 [N, H, W, 3].

        Returns:
            object_acc (top-1 among all objects), style_acc and background_acc, each float [N].
        """
        parsed = [self.dataset.parse(prompt) for prompt in prompts]
        rows = [row for row, spec in enumerate(parsed) if spec is not None]
        scores = {key: torch.full((len(prompts),), float("nan")) for key in ACCURACIES}
        if rows:
            specs = [spec for spec in parsed if spec is not None]
            for key, hits in correct(self.classifier(images[rows]), specs).items():
                scores[key][rows] = hits.float()
        return scores

    def predictions(self, images: Tensor) -> list[str]:
        """The English name of the most probable object in each image, or "none".

        Args:
            images: uint8 [N, H, W, 3].
        """
        output = self.classifier(images)
        best = zip(output.object_logits.argmax(1).tolist(), output.none.tolist(), strict=True)
        return ["none" if none else self.dataset.objects[index].en for index, none in best]

    def group(self, prompt: str) -> str | None:
        """ "en" or "zh", or None where the prompt is not of the dataset."""
        return self.dataset.language(prompt)
