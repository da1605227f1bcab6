"""The best value of a metric in a training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from fewstep.config.method import VALIDATION
from fewstep.config.sections import BestSettings


@dataclass(frozen=True)
class Best:
    """The best value of ``settings.metric`` so far, and the step after which it was logged."""

    settings: BestSettings
    step: int
    value: float

    def improved(self, value: float) -> bool:
        """Whether ``value`` is better than the best one."""
        return value > self.value if self.settings.mode == "max" else value < self.value

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON values."""
        return asdict(self) | {"settings": self.settings.model_dump()}

    @classmethod
    def restored(cls, state: Any, settings: BestSettings | None) -> Self | None:
        """What :meth:`state` gave; None where it is of another metric than ``settings`` name, as a resumed run may have
        another one."""
        if settings is None or not isinstance(state, Mapping) or state["settings"] != settings.model_dump():
            return None
        return cls(settings, state["step"], state["value"])


def missing_metric(
    settings: BestSettings | None, metrics: Mapping[str, float], step: int, reported: set[str]
) -> str | None:
    """A message, once, on a metric of ``settings`` that a line of metrics lacks, though it waits for no validation.

    Args:
        reported: names that were reported before; the new one is added.
    """
    validated = any(name.startswith(VALIDATION) for name in metrics)
    names = [] if settings is None else [settings.metric, *settings.at_least]
    for name in names:
        if name not in metrics and name not in reported and (validated or not name.startswith(VALIDATION)):
            reported.add(name)
            return f"train.keep_best.metric {name}: not logged at step {step}; there are {', '.join(metrics)}"
    return None


def new_best(
    best: Best | None,
    settings: BestSettings | None,
    step: int,
    metrics: Mapping[str, float],
    first: Mapping[str, float] | None = None,
) -> Best | None:
    """The best one where the metrics of ``step`` improve on ``best``, else None. NaN and infinity never do, nor does a
    step at which a metric of ``settings.at_least`` is missing, or below its share of the value in ``first``.
    """
    value = metrics.get(settings.metric) if settings is not None else None
    if settings is None or value is None or not math.isfinite(value):
        return None
    for name, share in settings.at_least.items():
        if name not in metrics or not metrics[name] >= share * (first or metrics)[name]:
            return None
    return Best(settings, step, value) if best is None or best.improved(value) else None
