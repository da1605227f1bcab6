"""How often two voters prefer the same image: a person and a judge, or two persons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from fewstep.data.preferences import Vote
from fewstep.preferences.agreement import Agreement, agreement

_Key = tuple[str, frozenset[str]]


@dataclass(frozen=True)
class VoterAgreement:
    """The share of the pairs of images on which both voters name a winner, and the same one."""

    first: str
    second: str
    agreement: Agreement


def voter_agreements(votes: Sequence[Vote]) -> list[VoterAgreement]:
    """Of every two voters with such pairs in common. A voter's last vote on a pair counts."""
    winners: dict[str, dict[_Key, str | None]] = defaultdict(dict)
    for vote in votes:
        winner = {"left": vote.left.image, "right": vote.right.image, "tie": None}[vote.choice]
        winners[vote.voter][vote.prompt, frozenset((vote.left.image, vote.right.image))] = winner
    found = []
    for first, second in combinations(winners, 2):
        one, other = winners[first], winners[second]
        keys = [key for key in one if one[key] is not None and other.get(key) is not None]
        if keys:
            same = np.array([one[key] == other[key] for key in keys])
            found.append(VoterAgreement(first, second, agreement(same, [prompt for prompt, _ in keys])))
    return found
