"""Ratings from votes: recovery of known strengths, intervals, degenerate cases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fewstep.data.preferences import Candidate, Choice, Vote
from fewstep.errors import UserError
from fewstep.preferences.bradley_terry import ELO_SCALE, bootstrap, compared_models, connected_groups, elo, fit
from fewstep.preferences.ranking import Ranking, print_ranking, rank
from fewstep.preferences.ranking_plot import write_plot


def simulated(strengths: np.ndarray, prompts: int, draw: np.random.Generator) -> np.ndarray:
    """One vote between every two models on each prompt, [P, K, K]."""
    count = len(strengths)
    chance = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
    won = np.triu(draw.random((prompts, count, count)) < chance, 1).astype(float)
    return won + np.triu(1 - won, 1).transpose(0, 2, 1)


def vote(number: int, left: str, right: str, choice: Choice, prompt: str | None = None, voter: str = "human") -> Vote:
    sides = [Candidate(model=name, image=f"{name}.png") for name in (left, right)]
    return Vote(
        vote=number, prompt=prompt or f"prompt {number}", left=sides[0], right=sides[1], choice=choice, voter=voter
    )


def test_two_models_have_the_closed_form() -> None:
    """log((w + 1/2) / (l + 1/2)), for many and few votes, and for one side alone."""
    for won, lost in [(7, 3), (700, 300), (20, 0), (0, 1), (2.5, 2.5)]:
        strengths = fit(np.array([[0.0, won], [lost, 0.0]]), ~np.eye(2, dtype=bool))
        assert strengths[0] - strengths[1] == pytest.approx(np.log((won + 0.5) / (lost + 0.5)), abs=1e-8)
        assert strengths.sum() == pytest.approx(0)


def test_400_points_are_odds_of_10_to_1() -> None:
    ratings = elo(np.array([np.log(10) / 2, -np.log(10) / 2]))
    assert ratings.tolist() == pytest.approx([1200, 800])


def test_ratings_recover_known_strengths() -> None:
    strengths = np.array([0.9, 0.2, -0.3, -0.8])
    wins = simulated(strengths, 4000, np.random.default_rng(0))
    assert fit(wins.sum(0), compared_models(wins)) == pytest.approx(strengths, abs=0.05)


def test_the_fit_is_the_maximum() -> None:
    """At the solution, expected and observed wins are the same, whatever the strengths."""
    draw = np.random.default_rng(1)
    for scale in (0.1, 2.0, 6.0):
        wins = simulated(scale * draw.standard_normal(6), 12, draw).sum(0)
        strengths, won = fit(wins, ~np.eye(6, dtype=bool)), wins + 0.5 * (1 - np.eye(6))
        chance = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
        assert (won.sum(1) - ((won + won.T) * chance).sum(1)) == pytest.approx(0, abs=1e-6)


def test_intervals_cover_the_truth() -> None:
    """95% intervals of differences, of 150 simulated votings."""
    strengths, draw = np.array([0.6, 0.0, -0.6]), np.random.default_rng(2)
    covered, total = 0, 0
    for _ in range(150):
        draws = bootstrap(simulated(strengths, 50, draw), samples=200)
        for i, j in [(0, 1), (1, 2), (0, 2)]:
            low, high = np.quantile(draws[:, i] - draws[:, j], [0.025, 0.975])
            covered += low <= strengths[i] - strengths[j] <= high
            total += 1
    assert 0.91 <= covered / total <= 0.98


def test_votes_on_one_prompt_are_not_independent() -> None:
    """Twenty equal votes on each prompt are no more certain than one."""
    once = simulated(np.array([0.5, 0.0]), 40, np.random.default_rng(3))
    one, many = (bootstrap(wins, 500)[:, 0].std() for wins in (once, 20 * once))
    assert many == pytest.approx(one, rel=0.15)


def test_ranking_of_votes(tmp_path: Path) -> None:
    choices = [("a", "b", "left"), ("b", "a", "left"), ("a", "b", "left"), ("a", "c", "tie"), ("c", "b", "left")]
    ranking = rank([vote(i, *each) for i, each in enumerate(choices, start=1)])  # type: ignore[arg-type]
    by_name = {one.model: one for one in ranking.models}
    assert {name: (one.wins, one.ties, one.losses) for name, one in by_name.items()} == {
        "a": (2, 1, 1), "b": (1, 0, 3), "c": (1, 1, 0),
    }  # fmt: skip
    assert by_name["a"].share == 2.5 / 4
    assert ranking.models[-1].model == "b"
    assert np.mean([one.elo for one in ranking.models]) == pytest.approx(1000)
    assert all(one.low <= one.elo <= one.high for one in ranking.models)
    (pair,) = [each for each in ranking.pairs if (each.first, each.second) == ("a", "b")]
    assert (pair.wins, pair.ties, pair.losses) == (2, 0, 1)
    assert pair.difference == pytest.approx(by_name["a"].elo - by_name["b"].elo)
    assert pair.low < pair.difference < pair.high
    ranking.save(tmp_path / "rank.json")
    tree = json.loads((tmp_path / "rank.json").read_text(encoding="utf-8"))
    assert tree["models"][0]["elo"] == ranking.models[0].elo
    assert (tree["votes"], tree["ties"], tree["prompts"], tree["voters"]) == (5, 1, 5, {"human": 5})


def test_agreement_of_voters() -> None:
    """The same image on the other side is the same; ties and pairs that one has not seen do not count."""
    mine = [vote(i, "a", "b", choice, f"p{i}") for i, choice in enumerate(("left", "right", "left", "tie", "left"), 1)]
    theirs = [
        vote(i, "b", "a", choice, f"p{i}", "judge")
        for i, choice in [(1, "right"), (2, "right"), (3, "tie"), (4, "left")]
    ]
    (found,) = rank([*mine, *theirs]).voter_agreement
    assert (found.first, found.second, found.agreement.votes, found.agreement.share) == ("human", "judge", 2, 0.5)
    assert rank(mine).voter_agreement == []


def test_the_side_does_not_matter() -> None:
    votes = [vote(1, "a", "b", "left"), vote(2, "a", "b", "tie"), vote(3, "a", "b", "right"), vote(4, "a", "b", "left")]
    swap: dict[Choice, Choice] = {"left": "right", "right": "left", "tie": "tie"}
    swapped = [vote(each.vote, "b", "a", swap[each.choice]) for each in votes]
    assert rank(votes) == rank(swapped)


def test_a_model_that_always_wins_has_a_finite_rating_and_a_note() -> None:
    ranking = rank([vote(i, "a", "b", "left") for i in range(1, 11)])
    assert ranking.models[0].elo - ranking.models[1].elo == pytest.approx(ELO_SCALE * np.log(21))
    assert ranking.notes == [
        "a won every vote: its rating depends on the virtual ties, its upper bound is too near.",
        "b lost every vote: its rating depends on the virtual ties, its lower bound is too near.",
    ]


def test_unconnected_models_are_refused() -> None:
    votes = [vote(1, "a", "b", "left"), vote(2, "c", "d", "left"), vote(3, "d", "e", "tie")]
    with pytest.raises(UserError, match=r"^x: no votes connect these groups of models: a, b \| c, d, e; collect"):
        rank(votes, "x")


def test_groups() -> None:
    compared = np.zeros((5, 5), bool)
    for i, j in [(0, 3), (3, 4), (1, 2)]:
        compared[i, j] = compared[j, i] = True
    assert connected_groups(compared) == [[0, 3, 4], [1, 2]]


@pytest.mark.parametrize("votes", [[vote(1, "a", "b", "left")], [vote(1, "a", "a", "left"), vote(2, "a", "a", "tie")]])
def test_too_few_votes(votes: list[Vote]) -> None:
    with pytest.raises(UserError, match="a ranking needs at least 2 of both"):
        rank(votes)


def test_table_and_plot(tmp_path: Path) -> None:
    names = ["a", "student[bold]", "a-name-of-a-model-that-is-rather-long"]
    votes = [vote(i, names[i % 3], names[(i + 1) % 3], "left" if i % 4 else "right") for i in range(1, 40)]
    ranking: Ranking = rank(votes)
    console = Console(width=80, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    print_ranking(ranking, console)
    text = console.export_text()
    assert "student[bold]" in text  # not taken for markup
    assert "39 votes on 39 prompts (human 39)" in text
    assert max(len(line) for line in text.splitlines()) <= 80
    write_plot(ranking, tmp_path / "rank.png")
    with Image.open(tmp_path / "rank.png") as image:
        assert image.width == 1080
