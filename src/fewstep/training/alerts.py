"""Alarms: a metric that has been wrong for a while, and what may be the cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AlertRule:
    """Goes off when a logged metric has been past its bound for `steps` steps without a break.

    kind: "above" compares with `bound`; "grows" with `bound` times the first value that was logged.
    cause: what it may mean and what to try, for a person to read.
    """

    metric: str
    kind: Literal["above", "grows"]
    bound: float
    steps: int
    cause: str


@dataclass(frozen=True)
class Alert:
    """An alarm that went off: `since` is the last step at which all was well."""

    alarm: AlertRule
    value: float
    since: int

    def __str__(self) -> str:
        alarm = self.alarm
        bound = f"{alarm.bound:g} times its first value" if alarm.kind == "grows" else f"{alarm.bound:g}"
        return f"{alarm.metric} is {self.value:.3g}, above {bound} since step {self.since}: {alarm.cause}"


class AlertMonitor:
    """Looks at every line of metrics. Each alarm goes off once; a new sitting starts with fresh eyes."""

    def __init__(self, alarms: Sequence[AlertRule], step: int) -> None:
        self._well = dict.fromkeys(alarms, step)  # alarm -> the last step at which all was well
        self._first: dict[str, float] = {}

    def check(self, step: int, metrics: Mapping[str, float]) -> Alert | None:
        """The first alarm that goes off at this line, if any."""
        for alarm, well in list(self._well.items()):
            value = metrics.get(alarm.metric)
            if value is None:
                if alarm.metric not in self._first:
                    self._well[alarm] = step  # nothing is known of it yet, such as of spear and shield in an alignment
                continue
            first = self._first.setdefault(alarm.metric, value)
            bound = alarm.bound * first if alarm.kind == "grows" else alarm.bound
            if value <= bound:
                self._well[alarm] = step
            elif step - well >= alarm.steps:
                del self._well[alarm]
                return Alert(alarm, value, well)
        return None
