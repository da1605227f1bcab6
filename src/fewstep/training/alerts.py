"""Alerts: a metric that has been wrong for a while, and what may be the cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AlertRule:
    """Raises an alert when a logged metric has been above its bound for `steps` steps without a break.

    kind: "above" compares with `bound`; "relative" with `bound` times the first logged value.
    cause: the likely cause and what to try, for the user.
    """

    metric: str
    kind: Literal["above", "relative"]
    bound: float
    steps: int
    cause: str


@dataclass(frozen=True)
class Alert:
    """An alert: `since` is the last step at which the metric was within its bound."""

    rule: AlertRule
    value: float
    since: int

    def __str__(self) -> str:
        rule = self.rule
        bound = f"{rule.bound:g} times its first value" if rule.kind == "relative" else f"{rule.bound:g}"
        return f"{rule.metric} is {self.value:.3g}, above {bound} since step {self.since}: {rule.cause}"


class AlertMonitor:
    """Checks every line of metrics. Each rule raises one alert; a resumed run starts anew."""

    def __init__(self, rules: Sequence[AlertRule], step: int) -> None:
        self._good = dict.fromkeys(rules, step)  # rule -> the last step within its bound
        self._first: dict[str, float] = {}

    def check(self, step: int, metrics: Mapping[str, float]) -> Alert | None:
        """The first alert at this line, if any."""
        for rule, good in list(self._good.items()):
            value = metrics.get(rule.metric)
            if value is None:
                if rule.metric not in self._first:
                    self._good[rule] = step  # not logged yet, such as CA and DM while their weights are 0
                continue
            first = self._first.setdefault(rule.metric, value)
            bound = rule.bound * first if rule.kind == "relative" else rule.bound
            if value <= bound:
                self._good[rule] = step
            elif step - good >= rule.steps:
                del self._good[rule]
                return Alert(rule, value, good)
        return None
