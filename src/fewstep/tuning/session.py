"""One session of a search: this process runs trials until the time is up, or several processes do."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from fewstep.config.load import parse_recipe
from fewstep.config.recipe import DistillRecipe
from fewstep.errors import UserError
from fewstep.evaluation.feature_networks import open_features
from fewstep.progress import log_line
from fewstep.training.distributed import DistContext
from fewstep.tuning.budget import Clock, rung_shares
from fewstep.tuning.objective import Objective
from fewstep.tuning.search import STUDY, Search
from fewstep.tuning.space import Space
from fewstep.tuning.study import FAILED, PAUSED, LiveTrial, Study
from fewstep.tuning.trials import TrialRunner
from fewstep.tuning.turns import one_at_a_time
from fewstep.tuning.workbench import Workbench

MAX_FAILURES = 10  # in a row
_POLL = 0.2  # seconds between two checks of the processes


@dataclass(frozen=True)
class Session:
    """What a process needs to run trials; it can be sent to another process.

    Attributes:
        recipe: as a tree: a recipe's class, with all methods in it, cannot be sent.
        features: the feature network of the objective; None where it needs none.
        seconds: of the whole search.
        trials: the most that are begun, of the whole search; None is no limit.
        threads: of torch; None leaves them as they are.
        parent: the process that started this one; None is none.
    """

    folder: Path
    recipe: dict[str, Any]
    space: Space
    objective: Objective
    rungs: int
    trial_minutes: float | None
    trial_steps: int | None
    validation: list[str]
    features: str | None
    device: str
    seconds: float
    trials: int | None
    seed: int
    resume_command: str
    threads: int | None = None
    parent: int | None = None

    def search(self) -> Search:
        recipe = parse_recipe(self.recipe, "recipe")
        assert isinstance(recipe, DistillRecipe)
        return Search(recipe, self.space, self.objective, self.rungs, self.trial_minutes, self.trial_steps)


def run_trials(session: Session) -> None:
    """Run trials until the time is up, or there are so many.

    Raises:
        UserError: too many trials in a row fail, or the storage cannot be used.
        KeyboardInterrupt: on Ctrl-C, with the command that continues.
    """
    if session.threads is not None:
        torch.set_num_threads(session.threads)
    search, folder = session.search(), session.folder
    study = Study(folder / STUDY, session.space, session.objective, session.seed)
    clock = Clock(session.seconds, study.seconds)
    device = torch.device(session.device)
    network = None if session.features is None else open_features(session.features, device)
    bench = Workbench(folder, clock, session.validation, network, DistContext(device=device))
    runner = TrialRunner(search, folder, study, bench, clock, session.resume_command)
    failed = 0  # in a row
    while (trial := _next_trial(session, study, clock)) is not None:
        runner.run(trial)
        row = trial.row
        if row.state == PAUSED:
            return
        failed = failed + 1 if row.state == FAILED else 0
        if failed == MAX_FAILURES:
            raise UserError(f"{folder}: {failed} trials in a row failed, the last one: {row.reason}")


def _next_trial(session: Session, study: Study, clock: Clock) -> LiveTrial | None:
    """A trial to run, unless the time is up, there are enough, or the process that started this one has ended."""
    shortest = 60 * (session.trial_minutes or 0) * rung_shares(session.rungs)[0]
    if clock.left <= shortest or (session.parent is not None and os.getppid() != session.parent):
        return None
    with one_at_a_time(session.folder / "next-trial"):
        enough = session.trials is not None and study.begun >= session.trials
        return None if enough and not study.paused else study.next_trial()


def run_parallel(session: Session, jobs: int) -> None:
    """Run trials in ``jobs`` processes; on several GPUs each has one, on a CPU each has its share of the threads. A
    process that is killed fails its trial, and another one takes its place.

    Raises: as :func:`run_trials`.
    """
    study = Study(session.folder / STUDY, session.space, session.objective)
    own = replace(session, parent=os.getpid(), threads=max(1, torch.get_num_threads() // jobs))
    running = {index: _start(own, index) for index in range(jobs)}
    problem = ""
    try:
        while running:
            time.sleep(_POLL)
            for index, process in list(running.items()):
                if process.is_alive():
                    continue
                del running[index]
                if process.exitcode == 0:
                    continue
                study.fail_killed(process.pid)
                if process.exitcode is not None and process.exitcode < 0:
                    log_line(f"a process of the search was killed by signal {-process.exitcode}; another one starts")
                    running[index] = _start(own, index)
                else:  # it has printed its error
                    problem = f"{session.folder}: process {index} of the search failed; its error is above"
    except KeyboardInterrupt:
        for process in running.values():
            process.join()  # it got the same Ctrl-C, and saves its trial
        raise KeyboardInterrupt(f"the trials are saved; continue with: {session.resume_command}") from None
    if problem:
        raise UserError(problem)


def _start(session: Session, index: int) -> BaseProcess:
    device = session.device
    if device == "cuda" and torch.cuda.device_count() > 1:
        device = f"cuda:{index % torch.cuda.device_count()}"
    own = replace(session, device=device, seed=session.seed + 10_000 * index)
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(own,))
    process.start()
    return process


def _work(session: Session) -> None:
    """The main function of a process among several."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_trials(session)
    except UserError as error:
        log_line(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(0)
