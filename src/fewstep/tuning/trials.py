"""One trial: its training from rung to rung, and how it ends."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from fewstep.core.device import is_out_of_memory
from fewstep.errors import UserError
from fewstep.progress import log_line
from fewstep.stages import free_memory
from fewstep.training.run_dir import RunDir
from fewstep.training.tracking import read_metrics
from fewstep.tuning.budget import Clock, rung_steps, seconds_per_step, steps_within
from fewstep.tuning.results import best_row, described
from fewstep.tuning.search import Search
from fewstep.tuning.study import FAILED, FINISHED, PAUSED, STOPPED, LiveTrial, Study, TrialRow
from fewstep.tuning.workbench import Workbench


class TrialRunner:
    """Runs trials of a search in its folder.

    Args:
        resume_command: shown after an interruption.
    """

    def __init__(
        self, search: Search, folder: Path, study: Study, bench: Workbench, clock: Clock, resume_command: str
    ) -> None:
        self.search, self.folder, self.study, self.bench, self.clock = search, folder, study, bench, clock
        self.resume_command = resume_command

    def run(self, trial: LiveTrial) -> None:
        """Train a trial until it ends, is stopped at a rung, fails, or there is no time for its next rung. A failure of
        the training or of its settings is noted with its reason.

        Raises:
            KeyboardInterrupt: on Ctrl-C; the trial is paused then.
        """
        number = trial.row.number
        folder = self.folder / "trials" / f"{number:04d}"
        try:
            self._train(trial, folder)
        except KeyboardInterrupt:
            trial.pause()
            raise
        except UserError as error:
            self._fail(trial, str(error).removeprefix(f"trial {number}: ").removeprefix(f"{folder}: "))
        except Exception as error:
            if not is_out_of_memory(error):
                trial.fail(f"{type(error).__name__}: {error}")
                raise
            self._fail(trial, "out of memory")
        finally:
            self.study.seconds = self.clock.used
            free_memory()
        if trial.row.state != PAUSED:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def _train(self, trial: LiveTrial, folder: Path) -> None:
        row = trial.row
        log_line(f"trial {row.number}: {described(row.values)}")
        if not row.steps:
            self._set_length(trial, folder)
            row = trial.row
        recipe = self.search.trial_recipe(row.number, row.values, row.steps)
        with RunDir(folder, recipe, resume_command=self.resume_command) as run:
            trainer = self.bench.trainer(recipe, run)
            for rung, end in enumerate(rung_steps(row.steps, self.search.rungs)):
                if rung < len(row.scores) - 1:
                    continue  # an earlier session passed it
                if self.clock.left < (end - row.taken) * row.seconds_per_step:
                    trial.pause()
                    log_line(f"trial {row.number}: paused at step {row.taken}; no time is left for its next part")
                    return
                trainer.fit(until=end)
                trial.note(taken=trainer.step, seconds=trainer.seconds)
                self.study.seconds = self.clock.used
                if self._ends(trial, rung, self._score(folder)):
                    return
                row = trial.row

    def _set_length(self, trial: LiveTrial, folder: Path) -> None:
        """Note the steps of the whole trial: given ones, or as many as its minutes have at the speed that is measured
        here."""
        minutes, steps = self.search.trial_minutes, self.search.trial_steps
        if minutes is not None:
            recipe = self.search.trial_recipe(trial.row.number, trial.row.values, self.search.recipe.train.steps)
            with torch.random.fork_rng():
                trainer = self.bench.trainer(recipe, RunDir(folder, recipe, read_only=True))
                speed = seconds_per_step(trainer, recipe.train.steps)
                del trainer
            free_memory()
            trial.note(timed=speed)
            steps = steps_within(minutes, speed)
        trial.note(steps=steps)

    def _score(self, folder: Path) -> float:
        """The objective as it was measured last. Raises: UserError if it is not finite."""
        key = self.search.objective.key
        value = next(line[key] for line in reversed(read_metrics(folder / "metrics.jsonl")) if key in line)
        if value is None:
            raise UserError(f"{key} is not finite")
        return float(value)

    def _ends(self, trial: LiveTrial, rung: int, score: float) -> bool:
        """Record the score at a rung; whether the trial ends there."""
        passes, last = trial.passes(rung, score), rung == self.search.rungs - 1
        if last:
            trial.finish(score)
        elif not passes:
            trial.stop()
        outcome = FINISHED if last else "continues" if passes else STOPPED
        self._log(trial.row, f"step {trial.row.taken} of {trial.row.steps}, {self._score_text(score)}, {outcome}")
        return last or not passes

    def _fail(self, trial: LiveTrial, reason: str) -> None:
        trial.fail(reason)
        self._log(trial.row, f"{FAILED}: {reason}")

    def _log(self, row: TrialRow, text: str) -> None:
        best = best_row(self.study.rows(), self.search.objective)
        shown = "" if best is None else f"; best {best.scores[-1]:.4g} (trial {best.number})"
        left = max(0.0, self.clock.left / 60)
        log_line(f"trial {row.number}: {text}{shown}; {left:.1f} of {self.clock.limit / 60:g} min left")

    def _score_text(self, score: float) -> str:
        return f"{self.search.objective.metric} {score:.4g}"
