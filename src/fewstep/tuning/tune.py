"""``fewstep tune``: hyperparameter search on a recipe's validation prompts, with Optuna's successive halving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.config.load import load_recipe, with_overrides
from fewstep.config.recipe import DistillRecipe, Recipe
from fewstep.core.device import AUTO, log_device, resolve_device
from fewstep.data.prompts import check_held_out, checked_prompts, open_prompts
from fewstep.errors import UserError
from fewstep.evaluation.applicability import check_applicable
from fewstep.evaluation.feature_networks import open_features
from fewstep.evaluation.teacher_distance import distance_name
from fewstep.evaluation.validation import validation_metrics
from fewstep.outputs import claimed_folder
from fewstep.progress import log_line
from fewstep.rewards.scorers import open_scorers
from fewstep.training.distributed import DistContext
from fewstep.training.precision import resolve_precision
from fewstep.training.run_dir import current_command
from fewstep.tuning.budget import Clock, expected_trials, rung_shares, rung_steps
from fewstep.tuning.objective import Objective, find_objective
from fewstep.tuning.report import write_report
from fewstep.tuning.results import best_row, failures, write_best, write_csv
from fewstep.tuning.search import STUDY, TRIALS, Search, claim, earlier_budget
from fewstep.tuning.session import Session, run_parallel, run_trials
from fewstep.tuning.space import Space, read_space
from fewstep.tuning.study import WAITING, Study, TrialRow

RUNGS = 3
SHARE = 5  # whole trials' lengths in a search, where none is given


@dataclass(frozen=True)
class TuneResult:
    """What a search found.

    Attributes:
        rows: every trial.
        best: the best one; None where none was measured.
        recipe: its recipe, as a file.
        report: the page that shows the search, likewise.
    """

    search: Search
    folder: Path
    rows: list[TrialRow]
    best: TrialRow | None
    recipe: Path | None
    report: Path | None


def tune(
    recipe: str | Path | DistillRecipe,
    space: str | Path | Space,
    *,
    minutes: float,
    out: str | Path | None = None,
    trials: int | None = None,
    trial_minutes: float | None = None,
    trial_steps: int | None = None,
    rungs: int = RUNGS,
    metric: str | None = None,
    direction: str | None = None,
    jobs: int = 1,
    seed: int = 0,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    device: str | torch.device = AUTO,
) -> TuneResult:
    """Search for the values of a recipe's keys that give the best validation metric; a second call continues.

    Every whole trial has the same minutes, or steps. It is measured after 1/9 and 1/3 of them and at its end (with 3
    rungs); only if it is among the best third of all trials so far, it continues, with its own learning-rate schedule
    over the whole length. Nothing is made of the test prompts.

    Args:
        recipe: a YAML file, the name of a bundled recipe, or a recipe in memory; its kind is distill.
        space: a YAML file, see :func:`fewstep.tuning.space.read_space`.
        minutes: of the whole search, over all its sessions; what the trials share (encoded prompts, the teacher's
            trajectories) is made before and does not count.
        out: folder; ``runs/<the recipe's name>-tune`` by default.
        trials: at most so many; None is no limit.
        trial_minutes: of training in a whole trial; a fifth of ``minutes`` by default, or the continued search's.
        trial_steps: of a whole trial, in place of ``trial_minutes``.
        metric: a validation metric, or "fd_teacher", the Fréchet distance to the teacher; None is the space's.
        direction: "max" or "min"; None is the space's, or the metric's own.
        jobs: processes that run trials at the same time. Each holds its own models.

    Raises:
        UserError: a mistake in the recipe, the space or the options; or too many trials in a row fail.
        KeyboardInterrupt: on Ctrl-C, after a checkpoint was saved; its text has the command that continues.
    """
    resolved = _resolved(recipe, overrides)
    opened = space if isinstance(space, Space) else read_space(space)
    folder = Path(out or Path("runs") / f"{resolved.name}-tune")
    dist = DistContext(device=resolve_device(device))
    opened.check(resolved)
    resolved.method.check_files()
    validation = _validation_prompts(resolved)
    objective, features = _objective(resolved, opened, validation, metric, direction)
    length = _trial_length(minutes, trial_minutes, trial_steps, {} if overwrite else earlier_budget(folder))
    resolved = resolve_precision(resolved, folder, dist, overwrite=True)
    search = Search(resolved, opened, objective, rungs, *length)
    with claimed_folder(folder):
        claim(folder, search, overwrite)
        study = Study(folder / STUDY, opened, objective)
        study.fail_killed()
        if not study.rows():
            study.suggest(opened.drawn(resolved))  # the recipe's own values are the first trial
        log_device(dist.device)
        log_line(_plan(search, Clock(60 * minutes, study.seconds), len(study.rows()), len(validation)))
        session = Session(
            *(folder, resolved.model_dump(mode="json"), opened, objective, rungs, *length, validation, features),
            *(str(dist.device), 60 * minutes, trials, seed, current_command()),
        )
        try:
            if jobs == 1:
                run_trials(session)
            else:
                run_parallel(session, jobs)
        finally:
            result = _results(search, folder, study.rows(), len(validation))
    return result


def _resolved(recipe: str | Path | DistillRecipe, overrides: Sequence[str]) -> DistillRecipe:
    """Raises: UserError if its kind is not distill."""
    if isinstance(recipe, Recipe):
        found: Recipe = with_overrides(recipe, overrides) if overrides else recipe
    else:
        found = load_recipe(recipe, overrides)
    if not isinstance(found, DistillRecipe):
        raise UserError(f"{recipe}: its kind is {found.kind}; a search tries recipes of kind distill")
    return found


def _validation_prompts(recipe: DistillRecipe) -> list[str]:
    """Raises: UserError if there are none, or the recipe trains on them."""
    source = open_prompts(recipe.prompts)
    found = list(source.texts("validation")[: recipe.evaluate.validation_prompts])
    if not found:
        raise UserError(
            f"prompts.source={recipe.prompts.source}: no validation prompts; name a file in prompts.validation_source"
        )
    check_held_out({"prompts": checked_prompts(source), **recipe.method.further_prompts()}, found, [])
    return found


def _objective(
    recipe: DistillRecipe, space: Space, validation: Sequence[str], metric: str | None, direction: str | None
) -> tuple[Objective, str | None]:
    """The objective, and its feature network if it needs one."""
    scorers, name = recipe.evaluate.scorers, metric or space.metric
    if scorers is not None:
        check_applicable(open_scorers(scorers), validation)
    source = "--metric" if metric is not None else space.source
    network = open_features(recipe.evaluate.features) if "fd_teacher" in (name or "") else None
    distance = distance_name(recipe.evaluate.features if network is None else network.name)
    known = [*validation_metrics(validation, scorers), f"val/{distance}"]
    own = direction or (space.direction if metric is None or metric == space.metric else None)
    return find_objective(name, own, known, source), None if network is None else recipe.evaluate.features


def _trial_length(
    minutes: float, trial_minutes: float | None, trial_steps: int | None, earlier: Mapping[str, Any]
) -> tuple[float | None, int | None]:
    """The minutes or the steps of a whole trial. Raises: UserError if both are given, or there is no time for
    one."""
    if trial_minutes is not None and trial_steps is not None:
        raise UserError("--trial-minutes and --trial-steps: give one of them")
    if trial_minutes is None and trial_steps is None:
        trial_minutes, trial_steps = earlier.get("minutes", minutes / SHARE), earlier.get("steps")
    if trial_minutes is not None and trial_minutes > minutes:
        raise UserError(f"--minutes {minutes:g}: less than one trial takes, which has {trial_minutes:g} minutes")
    return trial_minutes, trial_steps


def _plan(search: Search, clock: Clock, begun: int, prompts: int) -> str:
    """What will happen, and what it costs."""
    shares = rung_shares(search.rungs)
    if search.trial_minutes is not None:
        ends = ", ".join(f"{search.trial_minutes * share:.2g}" for share in shares)
        length = f"after {ends} min of training"
        about = expected_trials(clock.limit / 60, search.trial_minutes, search.rungs)
        length += f"; at most about {about} trials"
    else:
        ends = ", ".join(str(end) for end in rung_steps(search.trial_steps or 1, search.rungs))
        length = f"after {ends} steps"
    earlier = f" ({begun} trials and {clock.earlier / 60:.1f} min of them are done)" if begun and clock.earlier else ""
    return (
        f"search: {clock.limit / 60:g} min{earlier} over {len(search.space.keys)} keys; a trial is measured on "
        f"{prompts} validation prompts ({search.objective.metric}, {search.objective.direction}) {length}"
    )


def _results(search: Search, folder: Path, rows: Sequence[TrialRow], prompts: int) -> TuneResult:
    """Write what was found so far."""
    known = [row for row in rows if row.state != WAITING]
    best = best_row(known, search.objective)
    write_csv(folder / TRIALS, search, known)
    recipe = report = None
    if best is not None:
        recipe = write_best(folder, search, best, prompts)
        report = write_report(folder, search, known, prompts)
    for reason, count in failures(known).items():
        log_line(f"{count} failed: {reason}")
    return TuneResult(search, folder, known, best, recipe, report)
