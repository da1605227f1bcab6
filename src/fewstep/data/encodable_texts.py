"""Prompts that come with their features, wherever these are kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from fewstep.core.conditioning import EncodedPrompts


class EncodableTexts(Sequence[str]):
    """A sequence of prompts; :meth:`encoded` gives the features of some."""

    @abstractmethod
    def encoded(self, rows: Sequence[int]) -> EncodedPrompts:
        """The encoded prompts with these numbers, as one batch in fp32."""

    @abstractmethod
    def select(self, rows: Sequence[int] | np.ndarray) -> EncodableTexts:
        """The prompts with these numbers, as another sequence."""

    @abstractmethod
    def stored(self) -> EncodableTexts:
        """The same prompts, all of them encoded: from then on the text encoder has nothing to do for them."""
