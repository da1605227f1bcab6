"""What an evaluation finds: figures for each arm, targets against targets, and the pictures that a report shows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

Figures = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One promise with its number. `value` and `holds` are None where it could not be measured."""

    key: str
    text: str
    value: float | None
    low: float | None
    high: float | None
    holds: bool | None

    @property
    def target(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return f"at least {self.low:g}" if self.low is not None else f"at most {self.high:g}"


@dataclass
class Metrics:
    """metrics.json.

    arms: by name ("teacher_50", "student_4", ...) the figures of `evaluate.ARM_FIGURES`; None where they do not apply.
    real: the same figures of real images of the same prompts, the judge's ceiling and the distances' floor; empty when
        no prompt speaks of the emoji world.
    judge: the judge's own accuracy on real held-out images.
    settings: prompts, seeds and all else it takes to repeat the evaluation.
    """

    arms: dict[str, Figures]
    real: Figures = field(default_factory=dict)
    judge: Figures = field(default_factory=dict)
    settings: Figures = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)

    def save(self, path: str | Path) -> None:
        tree = {"arms": self.arms, "real": self.real, "judge": self.judge, "settings": self.settings}
        targets = [asdict(one) | {"target": one.target} for one in self.targets]
        text = json.dumps(tree | {"targets": targets}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        partial = Path(path).with_name(Path(path).name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Metrics:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
        targets = [
            Target(**{key: value for key, value in one.items() if key != "target"}) for one in tree.pop("targets")
        ]
        return cls(**tree, targets=targets)


@dataclass(frozen=True)
class ImageColumn:
    """One arm's pictures, for a report.

    images: uint8 [N,H,W,3], one a prompt. seeds: uint8 [P,S,H,W,3], several seeds of the first P prompts.
    taken_for: for each image, the name the judge gave a thing that should be another; None where it is right.
    """

    title: str
    images: Tensor
    seeds: Tensor
    taken_for: list[str | None]


@dataclass(frozen=True)
class Samples:
    """The prompts and every arm's pictures of them, by arm's name; real images are the column "real"."""

    prompts: list[str]
    columns: dict[str, ImageColumn]


def targets(arms: Mapping[str, Figures], student: str, teacher: str, few: str, few_guided: str) -> list[Target]:
    """What the student is held to, beside the teacher at its many steps and at the student's few."""

    def ratio(key: str, arm: str, reference: str) -> float | None:
        value, other = arms[arm].get(key), arms[reference].get(key)
        return value / other if value is not None and other else None

    def target(key: str, text: str, value: float | None, low: float | None = None, high: float | None = None) -> Target:
        holds = None
        if value is not None:
            holds = (low is None or value >= low) and (high is None or value <= high)
        return Target(key, text, value, low, high, holds)

    many, few_steps = arms[teacher]["steps"], arms[few]["steps"]
    return [
        target(
            "name_accuracy", f"name accuracy ÷ teacher's at {many} steps", ratio("name_top1", student, teacher), 0.95
        ),
        target(
            "over_few_steps",
            f"name accuracy ÷ teacher's at {few_steps}, unguided",
            ratio("name_top1", student, few),
            1.5,
        ),
        target(
            "fd_teacher",
            f"FD to the teacher ÷ that of its {few_steps} guided steps",
            ratio("fd_teacher", student, few_guided),
            high=0.5,
        ),
        target("diversity", "diversity ÷ teacher's", ratio("diversity", student, teacher), 0.8),
        target("saturation", "saturation ÷ teacher's", ratio("saturation", student, teacher), 0.85, 1.15),
        target("hf_energy", "high-frequency energy ÷ teacher's", ratio("hf_energy", student, teacher), 0.85, 1.15),
    ]


def interval(share: float, count: int) -> float:
    """Half the 95% confidence interval of a share measured on `count` samples (Wilson 1927: sound near 0 and 1 too)."""
    z = 1.96
    return z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
