"""What a search optimizes: one validation metric, and its direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.config.method import VALIDATION
from fewstep.errors import UserError

MAXIMIZE, MINIMIZE = "max", "min"

#: How the names of metrics begin or end whose better direction is known.
_MAXIMIZED_ENDINGS = ("_acc", "_score")
_MINIMIZED_BEGINNINGS = ("fd_", "mmd_")


@dataclass(frozen=True)
class Objective:
    """
    Attributes:
        metric: its name in metrics.jsonl without "val/".
        direction: "max" or "min".
    """

    metric: str
    direction: str

    @property
    def key(self) -> str:
        """The name in metrics.jsonl."""
        return VALIDATION + self.metric

    @property
    def maximizes(self) -> bool:
        return self.direction == MAXIMIZE

    def better(self, value: float, other: float) -> bool:
        """Whether a value is better than another one."""
        return value > other if self.maximizes else value < other


def find_objective(metric: str | None, direction: str | None, known: Sequence[str], source: str) -> Objective:
    """The objective that a user names.

    Args:
        metric: with or without "val/"; "fd_teacher" is "fd_teacher[NETWORK]".
        direction: None where the metric's is known.
        known: the names of all validation metrics, with "val/".
        source: the file or option that names it, for messages.

    Raises:
        UserError: there is no such metric, or its direction is not known.
    """
    names = [name.removeprefix(VALIDATION) for name in known]
    if metric is None:
        raise UserError(f"{source}: no metric; name one of {', '.join(names)}, as in metric: {names[0]}")
    plain = metric.removeprefix(VALIDATION)
    found = next((name for name in names if plain in (name, name.partition("[")[0])), None)
    if found is None:
        raise UserError(f"{source}: metric {metric}: not measured on validation prompts; there are {', '.join(names)}")
    if direction not in (None, MAXIMIZE, MINIMIZE):
        raise UserError(f"{source}: direction {direction}: expected {MAXIMIZE} or {MINIMIZE}")
    if direction is None and found.startswith(_MINIMIZED_BEGINNINGS):
        direction = MINIMIZE
    elif direction is None and found.endswith(_MAXIMIZED_ENDINGS):
        direction = MAXIMIZE
    if direction is None:
        raise UserError(
            f"{source}: metric {found}: whether more is better is not known; give direction: {MAXIMIZE}, or {MINIMIZE}"
        )
    return Objective(found, direction)
