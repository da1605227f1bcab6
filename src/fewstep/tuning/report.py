"""The report of a search: one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.atomic import write_text
from fewstep.config.recipe import flat_recipe
from fewstep.pages.render import render_page
from fewstep.tuning import plots
from fewstep.tuning.budget import REDUCTION, rung_shares
from fewstep.tuning.results import described, length, length_of, ranked, short_names, shown
from fewstep.tuning.search import BEST, REPORT, Search
from fewstep.tuning.space import Choices, Range
from fewstep.tuning.study import FAILED, TrialRow, importances

_TEMPLATE = Path(__file__).with_name("report.html")


def write_report(folder: Path, search: Search, rows: Sequence[TrialRow], prompts: int) -> Path:
    """Writes report.html into a search's folder. At least one trial has a score. Raises: UserError if it cannot."""
    write_text(folder / REPORT, render(search, rows, prompts, folder / BEST))
    return folder / REPORT


def render(search: Search, rows: Sequence[TrialRow], prompts: int, recipe: Path) -> str:
    """The page."""
    order, objective = ranked(rows, search.objective), search.objective
    best, names = order[0], short_names(search.space.keys)
    shares = importances(rows, search.space, objective)
    own = flat_recipe(search.recipe.model_dump(mode="json"))
    return render_page(
        _TEMPLATE,
        name=search.recipe.name,
        metric=objective.metric,
        recipe=recipe,
        summary=summary(search, rows),
        values=[
            (key, shown(own[key]) if key in own else "", shown(best.values[key]), tried(part))
            for key, part in search.space.keys.items()
        ],
        importance=plots.importance(shares) if shares else None,
        first=length_of(rung_shares(search.rungs)[0]),
        scored=sum(bool(row.scores) for row in rows),
        slices=plots.slices(search, rows),
        names=list(names.values()),
        rows=[
            [
                *(row.number, row.state, length(row, search.rungs), row.steps, f"{row.minutes:.1f}"),
                *(f"{row.scores[-1]:.4g}", *(shown(row.values[key]) for key in names)),
            ]
            for row in order
        ],
        failed=[(row.number, row.reason, described(row.values)) for row in rows if row.state == FAILED],
        how=how(search, prompts),
    )


def summary(search: Search, rows: Sequence[TrialRow]) -> str:
    """The search in a sentence or two."""
    best, metric = ranked(rows, search.objective)[0], search.objective.metric
    first = next((row for row in rows if row.number == 0 and len(row.scores) == len(best.scores)), None)
    text = (
        f"{len(rows)} trials, {sum(row.minutes for row in rows):.0f} minutes of training. Trial {best.number} has the "
        f"best {metric}, {best.scores[-1]:.4g}"
    )
    if first is None or first is best:
        return f"{text}."
    return f"{text}; the first trial, with the recipe's own values where the space has them, {first.scores[-1]:.4g}."


def how(search: Search, prompts: int) -> str:
    """How trials were run and compared."""
    whole = f"{search.trial_minutes:g} minutes" if search.trial_minutes is not None else f"{search.trial_steps} steps"
    shares = [length_of(share) for share in rung_shares(search.rungs)]
    ends = " and ".join([", ".join(shares[:-1]), shares[-1]] if len(shares) > 1 else shares)
    return (
        f"A whole trial has {whole} of training. It is measured after {ends} of it, on {prompts} validation prompts, "
        f"and continues if it is among the best 1/{REDUCTION} of all trials so far. The best of many noisy scores is "
        "too good by chance: the test prompts, which a search does not use, show what a recipe is worth."
    )


def tried(part: Range | Choices) -> str:
    """The values of a key, in short."""
    if isinstance(part, Choices):
        return ", ".join(shown(value) for value in part.values.values())
    return f"{part.low:g} to {part.high:g}{', log' * part.log}" + (f", step {part.step:g}" if part.step else "")
