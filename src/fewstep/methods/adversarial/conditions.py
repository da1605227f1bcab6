"""Kinds of prompts, for which a discriminator's AUC is also measured apart."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from fewstep.methods.adversarial.auc import auc
from fewstep.rewards.ocr import quoted_texts

#: "lettering": the prompt quotes text to be drawn. Of others "cjk" has a Chinese, Japanese or Korean character, "latin"
#: has none.
CONDITIONS = ("latin", "cjk", "lettering")
LEAST_PAIRS = 8  # of a condition and a step, below which they are left out

_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]")


def condition_of(prompt: str) -> int:
    """The index in ``CONDITIONS`` of a prompt's kind."""
    if quoted_texts(prompt):
        return CONDITIONS.index("lettering")
    return CONDITIONS.index("cjk" if _CJK.search(prompt) else "latin")


def auc_by_condition(pairs: Sequence[Tensor]) -> dict[str, float]:
    """The AUC of the pairs of each condition, as the mean over the steps that have enough of them.

    Args:
        pairs: of each step [N, 3]: a real score, a generated one, and the index of the condition.
    """
    found: dict[str, list[float]] = {}
    for step in pairs:
        for index, name in enumerate(CONDITIONS):
            own = step[step[:, 2] == index]
            if len(own) >= LEAST_PAIRS:
                found.setdefault(name, []).append(auc(own[:, 0], own[:, 1]))
    return {name: sum(areas) / len(areas) for name, areas in found.items()}
