"""The ranking of models by votes: ratings with their intervals, as a file, a table and a plot."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fewstep.atomic import write_text
from fewstep.data.preferences import Vote
from fewstep.errors import UserError
from fewstep.preferences.bradley_terry import bootstrap, compared_models, connected_groups, elo, fit
from fewstep.preferences.voter_agreement import VoterAgreement, voter_agreements

SAMPLES = 1000
LEVEL = 0.95
RANK_FILE, RANK_PLOT = "rank.json", "rank.png"


@dataclass(frozen=True)
class Rating:
    """A model's rating.

    Attributes:
        elo, low, high: on the Elo scale; the models' mean is 1000.
        share: of its votes that it won, a tie counted as half.
    """

    model: str
    elo: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    share: float

    @property
    def votes(self) -> int:
        return self.wins + self.ties + self.losses


@dataclass(frozen=True)
class PairResult:
    """The votes between two models, and the difference of their ratings (first minus second) with its interval."""

    first: str
    second: str
    wins: int
    ties: int
    losses: int
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Ranking:
    """rank.json.

    Attributes:
        models: the best first.
        voters: number of votes of each.
        voter_agreement: of every two voters with votes on the same pairs of images.
        notes: what limits the ratings.
    """

    models: list[Rating]
    pairs: list[PairResult]
    votes: int
    ties: int
    prompts: int
    voters: dict[str, int]
    voter_agreement: list[VoterAgreement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    method: str = (
        "Bradley-Terry, ties as half wins, one virtual tie for each two models that were compared; Elo scale, mean 1000"
    )
    interval: str = f"{LEVEL:.0%}, percentiles of {SAMPLES} draws of the prompts with replacement"

    def save(self, path: str | Path) -> None:
        """Raises: UserError if the file cannot be written."""
        tree: dict[str, Any] = asdict(self)
        write_text(path, json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def rank(votes: Sequence[Vote], where: str | Path = "votes") -> Ranking:
    """The ranking of the models in votes.

    Args:
        where: the file of the votes, for messages.

    Raises:
        UserError: fewer than two models or prompts, or models that no votes connect.
    """
    names = sorted({side.model for vote in votes for side in (vote.left, vote.right)})
    wins = _wins_by_prompt(votes, names)
    if len(names) < 2 or len(wins) < 2:
        raise UserError(
            f"{where}: votes on {len(names)} models and {len(wins)} prompts; a ranking needs at least 2 of both"
        )
    groups = connected_groups(compared_models(wins))
    if len(groups) > 1:
        listed = " | ".join(", ".join(names[i] for i in group) for group in groups)
        raise UserError(f"{where}: no votes connect these groups of models: {listed}; collect votes between them")
    strengths, draws = fit(wins.sum(0), compared_models(wins)), bootstrap(wins, SAMPLES)
    counts = {name: _counts(votes, name) for name in names}
    ratings = []
    for i, name in enumerate(names):
        won, tied, lost = counts[name]
        low, high = _interval(elo(draws[:, i]))
        share = (won + tied / 2) / (won + tied + lost)
        ratings.append(Rating(name, float(elo(strengths[i])), low, high, won, tied, lost, share))
    pairs = []
    for i, j in combinations(range(len(names)), 2):
        between = [vote for vote in votes if {vote.left.model, vote.right.model} == {names[i], names[j]}]
        low, high = _interval(elo(draws[:, i] - draws[:, j]) - elo(np.zeros(())))
        difference = float(elo(strengths[i] - strengths[j]) - elo(np.zeros(())))
        pairs.append(PairResult(names[i], names[j], *_counts(between, names[i]), difference, low, high))
    return Ranking(
        models=sorted(ratings, key=lambda one: -one.elo),
        pairs=pairs,
        votes=len(votes),
        ties=sum(vote.choice == "tie" for vote in votes),
        prompts=len(wins),
        voters=dict(Counter(vote.voter for vote in votes)),
        voter_agreement=voter_agreements(votes),
        notes=_notes(ratings),
    )


def print_ranking(ranking: Ranking, console: Console | None = None) -> None:
    """The table of ratings. Fits 80 columns with short names of models."""
    console = console or Console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("model", overflow="fold")
    for name in ("Elo", f"{LEVEL:.0%} interval", "won", "tied", "lost", "share won"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in ranking.models:
        cells = (f"{one.elo:.0f}", f"{one.low:.0f} to {one.high:.0f}", str(one.wins), str(one.ties), str(one.losses))
        table.add_row(Text(one.model), *cells, f"{100 * one.share:.1f}%")
    console.print(table)
    voters = ", ".join(f"{name} {count}" for name, count in ranking.voters.items())
    notes = [f"{ranking.votes} votes on {ranking.prompts} prompts ({voters}); share won counts a tie as half."]
    notes += [
        f"{one.first} and {one.second} prefer the same image: {one.agreement}." for one in ranking.voter_agreement
    ]
    for note in [*notes, *ranking.notes]:
        console.print(Text(note, style="dim"))


def plot_writer() -> Callable[[Ranking, Path], None]:
    """:func:`fewstep.preferences.ranking_plot.write_plot`, which needs a package of the "eval" extra.

    Raises:
        UserError: it is not installed.
    """
    try:
        from fewstep.preferences.ranking_plot import write_plot
    except ModuleNotFoundError as error:
        raise UserError(f"the plot of a ranking needs {error.name}; pip install 'fewstep[eval]'") from None
    return write_plot


def _wins_by_prompt(votes: Sequence[Vote], names: Sequence[str]) -> np.ndarray:
    """[P, K, K], as in :func:`fewstep.preferences.bradley_terry.fit`."""
    prompts = {prompt: row for row, prompt in enumerate(dict.fromkeys(vote.prompt for vote in votes))}
    models = {name: row for row, name in enumerate(names)}
    wins = np.zeros((len(prompts), len(models), len(models)))
    for vote in votes:
        row, left, right = prompts[vote.prompt], models[vote.left.model], models[vote.right.model]
        if left != right:
            wins[row, left, right] += {"left": 1.0, "tie": 0.5, "right": 0.0}[vote.choice]
            wins[row, right, left] += {"left": 0.0, "tie": 0.5, "right": 1.0}[vote.choice]
    return wins


def _counts(votes: Sequence[Vote], name: str) -> tuple[int, int, int]:
    """Won, tied and lost votes of a model."""
    found: Counter[str] = Counter()
    for vote in votes:
        for side, model in (("left", vote.left.model), ("right", vote.right.model)):
            if model == name:
                found["tied" if vote.choice == "tie" else "won" if vote.choice == side else "lost"] += 1
    return found["won"], found["tied"], found["lost"]


def _interval(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _notes(ratings: Sequence[Rating]) -> list[str]:
    found = []
    for one in ratings:
        if one.votes in (one.wins, one.losses):
            did, end = ("won", "upper") if one.wins else ("lost", "lower")
            found.append(
                f"{one.model} {did} every vote: its rating depends on the virtual ties, its {end} bound is too near."
            )
    return found
