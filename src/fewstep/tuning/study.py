"""Trials in Optuna's storage: new ones, their rungs and their ends; and all of them as plain rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.errors import UserError
from fewstep.tuning.budget import REDUCTION
from fewstep.tuning.objective import Objective
from fewstep.tuning.space import Choices, Range, Space

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.exceptions import StorageInternalError
    from optuna.trial import FrozenTrial, Trial, TrialState
    from sqlalchemy import URL
    from sqlalchemy.exc import SQLAlchemyError
except ModuleNotFoundError as missing:
    raise UserError(f"a search needs {missing.name}; pip install 'fewstep[tune]'") from None

optuna.logging.set_verbosity(optuna.logging.ERROR)  # it logs every study and trial

FINISHED, STOPPED, PAUSED, FAILED = "finished", "stopped", "paused", "failed"
RUNNING, WAITING = "running", "waiting"
MIN_IMPORTANCE_TRIALS = 6
_LOCK_SECONDS = 60  # that a process waits for others that write
KILLED = "its process was killed, perhaps for want of memory"

_STATES = {
    TrialState.COMPLETE: FINISHED, TrialState.PRUNED: STOPPED, TrialState.FAIL: FAILED, TrialState.WAITING: WAITING,
}  # fmt: skip


@dataclass(frozen=True)
class TrialRow:
    """A trial.

    Attributes:
        state: finished (its whole length), stopped (at a rung), paused (the same command continues it), failed, or
            running, or waiting (not begun).
        reason: why it failed.
        values: by recipe key.
        drawn: the same as the optimizer has them, with labels in place of choices that are no scalars.
        scores: the objective at each rung that it reached.
        steps: of the whole trial; 0 before they are known.
        taken: of these, so far.
        seconds_per_step: so far, or as measured before; 0 before it is known.
        minutes: of training so far.
    """

    number: int
    state: str
    reason: str
    values: dict[str, Any]
    drawn: dict[str, Any]
    scores: list[float]
    steps: int
    taken: int
    seconds_per_step: float
    minutes: float


class Study:
    """The trials of a search in an SQLite file.

    Args:
        seed: of the sampler; a continued search draws others than its beginning did.

    Raises:
        UserError: the file cannot be read or written.
    """

    def __init__(self, file: Path, space: Space, objective: Objective, seed: int = 0) -> None:
        self.file, self.space = file, space
        self._distributions = {key: _distribution(part) for key, part in space.keys.items()}
        with self._stored():
            self._study = optuna.create_study(
                storage=optuna.storages.RDBStorage(
                    URL.create("sqlite", database=str(file)).render_as_string(),
                    engine_kwargs={"connect_args": {"timeout": _LOCK_SECONDS}},
                ),
                study_name="fewstep",
                load_if_exists=True,
                direction="maximize" if objective.maximizes else "minimize",
                pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION),
            )
            self._study.sampler = optuna.samplers.TPESampler(seed=seed + len(self._study.trials))

    @property
    def seconds(self) -> float:
        """The time of all sessions so far."""
        with self._stored():
            return float(self._study.user_attrs.get("seconds", 0.0))

    @seconds.setter
    def seconds(self, value: float) -> None:
        with self._stored():
            self._study.set_user_attr("seconds", value)

    def rows(self) -> list[TrialRow]:
        """All trials, in order."""
        with self._stored():
            return [self._row(trial) for trial in self._study.get_trials(deepcopy=False)]

    @property
    def begun(self) -> int:
        """The number of trials that were begun."""
        return sum(row.state != WAITING for row in self.rows())

    @property
    def paused(self) -> bool:
        """Whether a trial waits for its continuation."""
        return any(row.state == PAUSED for row in self.rows())

    def fail_killed(self, process: int | None = None) -> None:
        """Mark trials whose process ended without a word as failed.

        Args:
            process: the one that ended; None is every process of earlier sessions.
        """
        with self._stored():
            for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                noted = trial.user_attrs
                if not noted.get("paused") and process in (None, noted.get("process")):
                    Trial(self._study, trial._trial_id).set_user_attr("reason", KILLED)
                    self._study.tell(trial.number, state=TrialState.FAIL)

    def suggest(self, drawn: Mapping[str, Any]) -> None:
        """Make these the values of the next new trial; keys that are missing are drawn."""
        with self._stored():
            self._study.enqueue_trial(dict(drawn))

    def next_trial(self) -> LiveTrial:
        """A paused trial, or else a new one."""
        with self._stored():
            waiting = [
                trial
                for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
                if trial.user_attrs.get("paused")
            ]
            trial = Trial(self._study, waiting[0]._trial_id) if waiting else self._study.ask(self._distributions)
            trial.set_user_attr("paused", False)
            trial.set_user_attr("process", os.getpid())
        return LiveTrial(self, self._study, trial)

    def _row(self, trial: FrozenTrial) -> TrialRow:
        noted = trial.user_attrs
        taken, seconds = noted.get("taken", 0), noted.get("seconds", 0.0)
        return TrialRow(
            number=trial.number,
            state=_STATES.get(trial.state, PAUSED if noted.get("paused") else RUNNING),
            reason=noted.get("reason", ""),
            values=self.space.values(trial.params),
            drawn=dict(trial.params),
            scores=[value for _, value in sorted(trial.intermediate_values.items())],
            steps=noted.get("steps", 0),
            taken=taken,
            seconds_per_step=seconds / taken if taken else noted.get("timed", 0.0),
            minutes=seconds / 60,
        )

    @contextmanager
    def _stored(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, StorageInternalError) as error:
            cause = error.__cause__ or error
            reason = str(getattr(cause, "orig", cause)).splitlines()[0]
            raise UserError(f"{self.file}: cannot be read or written ({reason})") from error


class LiveTrial:
    """A trial that this process trains."""

    def __init__(self, store: Study, study: optuna.Study, trial: Trial) -> None:
        self._store, self._study, self._trial = store, study, trial

    @property
    def row(self) -> TrialRow:
        """What is known of it."""
        return self._store.rows()[self._trial.number]

    def note(self, **values: Any) -> None:
        """Remember plain values: steps, seconds."""
        with self._store._stored():
            for name, value in values.items():
                self._trial.set_user_attr(name, value)

    def passes(self, rung: int, score: float) -> bool:
        """Report the score at a rung, counted from 0; whether the trial is among those that reach the next one. A rung
        that was reported before is not reported again."""
        with self._store._stored():
            if len(self.row.scores) <= rung:
                self._trial.report(score, REDUCTION**rung)
            return not self._trial.should_prune()

    def finish(self, score: float) -> None:
        with self._store._stored():
            self._study.tell(self._trial, score)

    def stop(self) -> None:
        with self._store._stored():
            self._study.tell(self._trial, state=TrialState.PRUNED)

    def pause(self) -> None:
        """The next session continues it."""
        self.note(paused=True)

    def fail(self, reason: str) -> None:
        self.note(reason=reason)
        with self._store._stored():
            self._study.tell(self._trial, state=TrialState.FAIL)


def _distribution(part: Range | Choices) -> BaseDistribution:
    if isinstance(part, Choices):
        return CategoricalDistribution(list(part.values))
    if part.is_integer:
        step = 1 if part.step is None else int(part.step)
        return IntDistribution(int(part.low), int(part.high), log=part.log, step=step)
    return FloatDistribution(part.low, part.high, log=part.log, step=part.step)


def importances(rows: Sequence[TrialRow], space: Space, objective: Objective) -> dict[str, float]:
    """Each key's share of the importance for the first rung's scores, which all trials have after equal lengths
    (PED-ANOVA, arXiv 2304.10255); empty if there are fewer than ``MIN_IMPORTANCE_TRIALS``."""
    scored = [row for row in rows if row.scores]
    if len(scored) < MIN_IMPORTANCE_TRIALS:
        return {}
    distributions = {key: _distribution(part) for key, part in space.keys.items()}
    study = optuna.create_study(direction="maximize" if objective.maximizes else "minimize")
    for row in scored:
        params = {key: row.drawn[key] for key in distributions}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=row.scores[0]))
    found = optuna.importance.get_param_importances(study)
    return {key: float(found.get(key, 0.0)) for key in distributions}
