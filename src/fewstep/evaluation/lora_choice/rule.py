"""The rule that recommends a checkpoint, or a strength, from measured figures. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MIN_FLEXIBILITY = 0.9
MIN_MEMORIZATION = 0.5
MAX_OVERBAKE = 1.15
MIN_SHARPNESS = 0.8
TIE = 0.01  # scores this close count as equal


@dataclass(frozen=True)
class Figures:
    """What is measured on the images of one checkpoint and strength.

    Attributes:
        likeness: mean cosine similarity of features to the training images; on prompts of the set.
        flexibility: prompt adherence on unseen prompts over that without the LoRA; at most 1.
        memorization: median distance to the nearest training image over that among training images; below 1, images
            are nearer to training images than these are to one another. On prompts of the set.
        saturation, hf_energy: of all images.
    """

    likeness: float
    flexibility: float
    memorization: float
    saturation: float
    hf_energy: float


@dataclass(frozen=True)
class Reference:
    """What figures are compared with.

    Attributes:
        without: images without the LoRA.
        real: the training images; their likeness is that to one another.
    """

    without: Figures
    real: Figures

    def learned(self, figures: Figures) -> float:
        """Likeness from 0, without the LoRA, to 1, that among training images; 1 where there is nothing to learn."""
        start, goal = self.without.likeness, self.real.likeness
        return 1.0 if goal <= start else min(1.0, max(0.0, (figures.likeness - start) / (goal - start)))

    def overbake(self, figures: Figures) -> float:
        """The larger of saturation and high-frequency energy, each over the larger of its two references."""
        pairs = [
            (figures.saturation, max(self.without.saturation, self.real.saturation)),
            (figures.hf_energy, max(self.without.hf_energy, self.real.hf_energy)),
        ]
        return max(value / max(limit, 1e-9) for value, limit in pairs)

    def sharpness(self, figures: Figures) -> float:
        """High-frequency energy over the smaller of its two references: a few-step model that loses its steps blurs."""
        return figures.hf_energy / max(min(self.without.hf_energy, self.real.hf_energy), 1e-9)

    def score(self, figures: Figures) -> float:
        """The harmonic mean of likeness, from 0 to 1, and flexibility."""
        learned, kept = self.learned(figures), max(0.0, figures.flexibility)
        return 2 * learned * kept / (learned + kept) if learned + kept > 0 else 0.0

    def exceeded(self, figures: Figures) -> list[str]:
        """The limits that figures exceed, in words."""
        found = []
        if figures.flexibility < MIN_FLEXIBILITY:
            found.append(f"flexibility {figures.flexibility:.2f}, below {MIN_FLEXIBILITY:g}")
        if figures.memorization < MIN_MEMORIZATION:
            found.append(f"memorization {figures.memorization:.2f}, below {MIN_MEMORIZATION:g}")
        if (overbake := self.overbake(figures)) > MAX_OVERBAKE:
            found.append(f"overbake {overbake:.2f}, above {MAX_OVERBAKE:g}")
        if (sharpness := self.sharpness(figures)) < MIN_SHARPNESS:
            found.append(f"sharpness {sharpness:.2f}, below {MIN_SHARPNESS:g}")
        return found


@dataclass(frozen=True)
class Choice:
    """
    Attributes:
        best, runner_up: names; no runner-up where there is one candidate.
        reasons: sentences.
    """

    best: str
    runner_up: str | None
    reasons: list[str]


def ranking(candidates: Mapping[str, Figures], reference: Reference) -> list[str]:
    """Names, the best first: by the number of exceeded limits, then by score in units of ``TIE``, then as given."""

    def key(name: str) -> tuple[int, int]:
        figures = candidates[name]
        return len(reference.exceeded(figures)), -round(reference.score(figures) / TIE)

    return sorted(candidates, key=key)


def choose(candidates: Mapping[str, Figures], reference: Reference) -> Choice:
    """The best of at least one candidate, given in the order in which ties are resolved."""
    order = ranking(candidates, reference)
    best, others = order[0], order[1:]
    reasons = [f"{best}: {_described(candidates[best], reference)}."]
    if exceeded := reference.exceeded(candidates[best]):
        reasons.append(f"No candidate is within all limits; {best} exceeds the fewest ({', '.join(exceeded)}).")
    if others:
        reasons.append(f"Runner-up {others[0]}: {_described(candidates[others[0]], reference)}.")
    reasons += _left_out(others, candidates, reference)
    return Choice(best, others[0] if others else None, reasons)


def _described(figures: Figures, reference: Reference) -> str:
    return (
        f"score {reference.score(figures):.2f}, likeness {reference.learned(figures):.2f} of the way to the training "
        f"images, flexibility {figures.flexibility:.2f}, memorization {figures.memorization:.2f}, overbake "
        f"{reference.overbake(figures):.2f}"
    )


def _left_out(names: Sequence[str], candidates: Mapping[str, Figures], reference: Reference) -> list[str]:
    return [
        f"{name} exceeds: {', '.join(exceeded)}."
        for name in names
        if (exceeded := reference.exceeded(candidates[name]))
    ]
