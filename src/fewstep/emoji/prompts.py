"""The prompt source "emoji": training, validation and test prompts of the emoji dataset."""

from __future__ import annotations

from collections.abc import Sequence

from fewstep.config.sections import PromptSettings
from fewstep.data.prompts import PromptSplit
from fewstep.emoji.dataset import NUM_TEMPLATES, EmojiDataset
from fewstep.errors import UserError


class EmojiPrompts:
    """Prompts in both languages and all wordings.

    train: every spec of the training split in each of its wordings, in a fixed order.
    validation, test: the two halves of the held-out specs, shuffled. The first N prompts, N being the number of specs
    of the half, are of N different specs; then each spec follows in its second and third wording.

    Raises:
        UserError: the settings name files for validation or test prompts, which this source does not read.
    """

    def __init__(self, settings: PromptSettings) -> None:
        for key in ("validation_source", "test_source"):
            if getattr(settings, key) is not None:
                raise UserError(f"prompts.{key}: the emoji dataset has its own held-out prompts; leave {key} null")
        self.dataset = EmojiDataset.load()

    def texts(self, split: PromptSplit) -> Sequence[str]:
        dataset = self.dataset
        if split == "train":
            return [
                dataset.prompt(spec, template) for spec in dataset.specs("train") for template in range(NUM_TEMPLATES)
            ]
        specs = dataset.sample(len(dataset.specs(split)), split)
        return [
            dataset.prompt(spec, (index + shift) % NUM_TEMPLATES)
            for shift in range(NUM_TEMPLATES)
            for index, spec in enumerate(specs)
        ]
