"""The result of an evaluation: figures of each setting, targets, and the images that a report shows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.atomic import write_text
from fewstep.evaluation.feature_networks import with_network

Figures = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One target with its measured value; ``value`` and ``passed`` are None where it could not be measured."""

    key: str
    text: str
    value: float | None
    low: float | None
    high: float | None
    passed: bool | None

    @property
    def target(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return f"at least {self.low:g}" if self.low is not None else f"at most {self.high:g}"


@dataclass
class Metrics:
    """metrics.json.

    Attributes:
        figures: of each setting ("teacher_50", "student_4", ...): scores, distances and diversity with the feature
            network in their keys ("fd_teacher[open-nsfw]"), pixel statistics, nfe, time; None where not applicable.
        real: the same of real images of the same prompts: the ceiling of scores and the floor of distances; empty
            where no prompt has real images.
        scorers: accuracy on real images of each scorer that has one.
        features: name of the feature network.
        run: prompts, seeds, scorers and feature network as they were given, the number of prompts that each score
            applies to, device, dtype, torch's version: what it takes to repeat the evaluation.
    """

    figures: dict[str, Figures]
    real: Figures = field(default_factory=dict)
    scorers: dict[str, Figures] = field(default_factory=dict)
    features: str = ""
    run: Figures = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)

    def save(self, path: str | Path) -> None:
        """Raises: UserError if the file cannot be written."""
        tree = asdict(self) | {"targets": [asdict(one) | {"target": one.target} for one in self.targets]}
        write_text(path, json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Metrics:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
        found = [Target(**{key: value for key, value in one.items() if key != "target"}) for one in tree.pop("targets")]
        return cls(**tree, targets=found)


@dataclass(frozen=True)
class ImageColumn:
    """One setting's images in a report.

    Attributes:
        images: uint8 [N, H, W, 3], one for each prompt; of videos, strips of their frames.
        seeds: uint8 [P, S, H, W, 3], several seeds of the first P prompts.
        predicted_as: the name that a classifier gives each image where it is wrong; None elsewhere.
    """

    title: str
    images: Tensor
    seeds: Tensor
    predicted_as: list[str | None]


@dataclass(frozen=True)
class Samples:
    """The prompts, and every setting's images of them by name; real images are the column "real"."""

    prompts: list[str]
    columns: dict[str, ImageColumn]


def targets(
    figures: Mapping[str, Figures], student: str, teacher: str, few: str, few_guided: str, network: str
) -> list[Target]:
    """The targets of a student beside its teacher at many steps and at the student's few; of scores, those measured."""

    def ratio(key: str, setting: str, reference: str) -> float | None:
        value, other = figures[setting].get(key), figures[reference].get(key)
        return value / other if value is not None and other else None

    def target(key: str, text: str, value: float | None, low: float | None = None, high: float | None = None) -> Target:
        passed = None
        if value is not None:
            passed = (low is None or value >= low) and (high is None or value <= high)
        return Target(key, text, value, low, high, passed)

    many, few_steps = figures[teacher]["steps"], figures[few]["steps"]
    fd, diversity = with_network("fd_teacher", network), with_network("diversity", network)
    found = []
    if figures[student].get("object_acc") is not None:
        found += [
            target(
                *("object_acc", f"object accuracy ÷ teacher's at {many} steps"),
                *(ratio("object_acc", student, teacher), 0.95),
            ),
            target(
                *("over_few_steps", f"object accuracy ÷ teacher's at {few_steps}, unguided"),
                *(ratio("object_acc", student, few), 1.5),
            ),
        ]
    if figures[student].get("clip_score") is not None:
        value = ratio("clip_score", student, teacher)
        found.append(target("clip_score", f"CLIP score ÷ teacher's at {many} steps", value, 0.95))
    text = f"FD to the teacher ÷ that of its {few_steps} guided steps"
    return [
        *found,
        target("fd_teacher", text, ratio(fd, student, few_guided), high=0.5),
        target("diversity", "diversity ÷ teacher's", ratio(diversity, student, teacher), 0.8),
        target("saturation", "saturation ÷ teacher's", ratio("saturation", student, teacher), 0.85, 1.15),
        target("hf_energy", "high-frequency energy ÷ teacher's", ratio("hf_energy", student, teacher), 0.85, 1.15),
    ]


def interval(share: float, count: int) -> float:
    """Half the 95% confidence interval of a share measured on `count` samples (Wilson 1927: sound near 0 and 1 too)."""
    z = 1.96
    return z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
