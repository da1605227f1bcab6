"""Alerts: metrics that have been wrong for a while, and what may be the cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


class Rule(Protocol):
    """Raises an alert when logged metrics have been out of bounds for `steps` steps without a break."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that it needs; a line without one of them is not judged."""
        ...

    @property
    def steps(self) -> int: ...

    def within(self, values: Sequence[float], first: Sequence[float]) -> bool:
        """Whether the metrics are within bounds; `first` are the first values that were logged."""
        ...

    def describe(self, values: Sequence[float], first: Sequence[float], since: int) -> str:
        """The alert in a line, with the likely cause and what to try."""
        ...


@dataclass(frozen=True)
class AlertRule:
    """One metric out of its bound.

    kind: "above" compares with `bound`; "relative" with `bound` times the first logged value; "fallen" is below that.
    cause: the likely cause and what to try, for the user.
    """

    metric: str
    kind: Literal["above", "relative", "fallen"]
    bound: float
    steps: int
    cause: str

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    def within(self, values: Sequence[float], first: Sequence[float]) -> bool:
        if self.kind == "fallen":
            return values[0] >= self.bound * first[0]
        return values[0] <= (self.bound * first[0] if self.kind == "relative" else self.bound)

    def describe(self, values: Sequence[float], first: Sequence[float], since: int) -> str:
        bound = f"{self.bound:g}" if self.kind == "above" else f"{self.bound:g} times its first value"
        side = "below" if self.kind == "fallen" else "above"
        return f"{self.metric} is {values[0]:.3g}, {side} {bound} since step {since}: {self.cause}"


@dataclass(frozen=True)
class DivergenceRule:
    """One metric above its first value while another one is below `share` of its own: what the first gains, the second
    pays for.
    """

    rising: str
    falling: str
    share: float
    steps: int
    cause: str

    @property
    def metrics(self) -> tuple[str, ...]:
        return self.rising, self.falling

    def within(self, values: Sequence[float], first: Sequence[float]) -> bool:
        return values[0] <= first[0] or values[1] >= self.share * first[1]

    def describe(self, values: Sequence[float], first: Sequence[float], since: int) -> str:
        rose, fell = (f"from {old:.3g} to {new:.3g}" for old, new in zip(first, values, strict=True))
        return f"{self.rising} rose {rose} while {self.falling} fell {fell}, since step {since}: {self.cause}"


@dataclass(frozen=True)
class Alert:
    """An alert: `since` is the last step at which its metrics were within bounds."""

    text: str
    since: int

    def __str__(self) -> str:
        return self.text


class AlertMonitor:
    """Checks every line of metrics. Each rule raises one alert; in a resumed run it may raise another.

    first: the first logged value of each metric; values of later lines are added.
    """

    def __init__(self, rules: Sequence[Rule], step: int, first: dict[str, float] | None = None) -> None:
        self._good = dict.fromkeys(rules, step)  # rule -> the last step within its bounds
        self._first = {} if first is None else first

    def check(self, step: int, metrics: Mapping[str, float]) -> Alert | None:
        """The first alert at this line, if any."""
        for name, value in metrics.items():
            self._first.setdefault(name, value)
        for rule, good in list(self._good.items()):
            values = [metrics[name] for name in rule.metrics if name in metrics]
            if len(values) < len(rule.metrics):
                if not all(name in self._first for name in rule.metrics):
                    self._good[rule] = step  # not logged yet, such as CA and DM while their weights are 0
                continue
            first = [self._first[name] for name in rule.metrics]
            if rule.within(values, first):
                self._good[rule] = step
            elif step - good >= rule.steps:
                del self._good[rule]
                return Alert(rule.describe(values, first, good), good)
        return None
