"""Who votes: a person on the page, or a reward or scorer, which prefers the image with the higher score."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.registry import load_plugins, rewards, scorers
from fewstep.data.images import to_uint8
from fewstep.data.preferences import Choice
from fewstep.errors import UserError
from fewstep.preferences.image_batches import PromptedImage, image_batches
from fewstep.preferences.session import VotingSession
from fewstep.progress import progress_bar
from fewstep.rewards.protocol import Reward, Scorer
from fewstep.rewards.specs import open_plugin

HUMAN = "human"
#: What the name of a voter begins with whose votes are those of an evaluation scorer, which nothing may be trained on.
SCORER = "scorer:"
REWARD = "reward:"

_CHUNK = 16  # comparisons whose images are scored together
_SAME = 1e-6  # relative difference of scores that are a tie

#: (images [B, 3, H, W] in [0, 1], prompts) -> B scores, NaN where there is none.
Score = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class Judge:
    """A reward or scorer that votes.

    Attributes:
        name: of the voter, "reward:NAME[:ARGUMENT]" or "scorer:NAME[:ARGUMENT]".
    """

    name: str
    score: Score


def is_human(spec: str) -> bool:
    """Whether a voter is a person: "human" or "human:NAME". Raises: UserError for "human:" without a name."""
    kind, colon, name = spec.partition(":")
    if kind == HUMAN and colon and not name.strip():
        raise UserError(f"--voter {spec}: a name is missing; write human, or human:NAME")
    return kind == HUMAN


def open_judge(spec: str, device: torch.device | str = "cpu") -> Judge:
    """The judge of "NAME[:ARGUMENT]": the reward of this name, or, where there is none, the scorer; "reward:" or
    "scorer:" before it decides.

    A scorer's score of an image is the mean of those of its scores that apply.

    Raises:
        UserError: there is neither, or it cannot be opened.
    """
    load_plugins()
    plain = spec.removeprefix(REWARD).removeprefix(SCORER)
    name = plain.partition(":")[0]
    if name in rewards and not spec.startswith(SCORER):
        reward: Reward = open_plugin(rewards, plain, device)

        def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
            with torch.no_grad():
                return reward(images.to(device), prompts)

        return Judge(REWARD + plain, score)
    if name in scorers and not spec.startswith(REWARD):
        scorer: Scorer = open_plugin(scorers, plain, device)

        def mean_score(images: Tensor, prompts: Sequence[str]) -> Tensor:
            return torch.stack(list(scorer.score(to_uint8(images), prompts).values())).float().nanmean(dim=0)

        return Judge(SCORER + plain, mean_score)
    known = [HUMAN, *(REWARD + each for each in rewards.names()), *(SCORER + each for each in scorers.names())]
    raise UserError(f"unknown voter {spec!r}; known: {', '.join(known)}")


def cast_votes(session: VotingSession, judge: Judge) -> int:
    """Vote on all pending comparisons of a session; returns how many had no vote because an image had no finite score.

    Raises:
        UserError: an image or the file of votes.
        KeyboardInterrupt: with a message for the user; votes that were cast are kept.
    """
    pending, skipped = session.pending(), 0
    try:
        with progress_bar(len(pending), f"votes of {judge.name}") as advance:
            for start in range(0, len(pending), _CHUNK):
                chunk = pending[start : start + _CHUNK]
                sides = [(prompt, side.image) for prompt, left, right in chunk for side in (left, right)]
                wanted = {PromptedImage(prompt, image) for prompt, image in sides}
                scores = _scores(session.folder, sorted(wanted), judge.score)
                for prompt, left, right in chunk:
                    both = (scores[PromptedImage(prompt, side.image)] for side in (left, right))
                    choice = _choice(*both)
                    if choice is None:
                        skipped += 1
                    else:
                        session.record(prompt, left, right, choice)
                advance(len(chunk))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {session.done} of {session.total} pairs have a vote in {session.log.path}; the same command "
            "continues"
        ) from None
    return skipped


def _scores(folder: Path, wanted: Sequence[PromptedImage], score: Score) -> dict[PromptedImage, float]:
    found: dict[PromptedImage, float] = {}
    for keys, images in image_batches(folder, wanted):
        found |= dict(zip(keys, score(images, [key.prompt for key in keys]).tolist(), strict=True))
    return found


def _choice(left: float, right: float) -> Choice | None:
    if not (math.isfinite(left) and math.isfinite(right)):
        return None
    if math.isclose(left, right, rel_tol=_SAME, abs_tol=_SAME):
        return "tie"
    return "left" if left > right else "right"
