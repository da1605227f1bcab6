"""Training of a preference head on votes, with its agreement on votes that it has not seen."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.seeds import derive_seed
from fewstep.data.preferences import Vote, read_votes, votes_file
from fewstep.errors import UserError
from fewstep.preferences.agreement import Agreement, agreement
from fewstep.preferences.features import PreferenceFeatures, open_preference_features, stored_spec
from fewstep.preferences.head import PreferenceHead, check_free, fit_head, save_head, vote_loss
from fewstep.preferences.image_batches import PromptedImage, image_batches
from fewstep.preferences.voters import SCORER
from fewstep.progress import progress_bar, track

MIN_PROMPTS = 10
FOLDS = 5
#: Of the weights' penalty, chosen by cross-validation.
L2_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
_OUTCOMES = {"left": 1.0, "tie": 0.5, "right": 0.0}


@dataclass(frozen=True)
class TrainedHead:
    """A trained head.

    Attributes:
        held_out: its agreement with votes on prompts that it was not trained on.
        models_alone: that of preferring the image of whichever of the two models won more training votes against the
            other: what can be known without an image.
        trained: its agreement with the votes that it was trained on.
    """

    head: PreferenceHead
    held_out: Agreement
    models_alone: Agreement
    trained: Agreement
    description: dict[str, Any]


@dataclass(frozen=True)
class _Votes:
    """Votes as tensors: indices of images into their features, and outcomes for the left image."""

    features: Tensor
    left: Tensor
    right: Tensor
    outcomes: Tensor
    votes: list[Vote]

    def some(self, rows: Sequence[int]) -> _Votes:
        index = torch.tensor(rows, dtype=torch.long)
        left, right, outcomes = self.left[index], self.right[index], self.outcomes[index]
        return _Votes(self.features, left, right, outcomes, [self.votes[row] for row in rows])

    def fit(self, l2: float) -> PreferenceHead:
        return fit_head(self.features, self.left, self.right, self.outcomes, l2)

    def margins(self, head: PreferenceHead) -> Tensor:
        return head(self.features[self.left]) - head(self.features[self.right])


def train_head(
    source: str | Path,
    out: str | Path,
    *,
    features: str = "open-nsfw",
    voter: str | None = None,
    held_out: float = 0.2,
    seed: int = 0,
    overwrite: bool = False,
    device: str | torch.device = "cpu",
) -> TrainedHead:
    """Train a head on the votes of a folder, and write it to ``out``.

    Args:
        features: as in :func:`fewstep.preferences.features.open_preference_features`.
        voter: only this one's votes; None is all voters.
        held_out: the share of the prompts whose votes measure the head.
        overwrite: replace an earlier head.

    Raises:
        UserError: too few votes, an image that cannot be read, unknown features, or an ``out`` that cannot be used.
    """
    check_free(out, overwrite=overwrite)
    votes, where = read_votes(source, voter), votes_file(source)
    prompts = sorted({vote.prompt for vote in votes})
    if len(prompts) < MIN_PROMPTS:
        raise UserError(f"{where}: votes on {len(prompts)} prompts; a head needs votes on at least {MIN_PROMPTS}")
    random.Random(derive_seed("held-out prompts", seed)).shuffle(prompts)
    apart = set(prompts[: max(2, round(held_out * len(prompts)))])
    if all(vote.choice == "tie" for vote in votes if vote.prompt in apart):
        raise UserError(f"{where}: the votes on the held-out prompts are all ties; collect more votes")
    if all(vote.choice == "tie" for vote in votes if vote.prompt not in apart):
        raise UserError(f"{where}: the votes on the training prompts are all ties; collect more votes")
    _warn_of_scorers(votes)
    all_votes = _tensors(votes, where.parent, open_preference_features(features, device))
    train = all_votes.some([row for row, vote in enumerate(votes) if vote.prompt not in apart])
    test = all_votes.some([row for row, vote in enumerate(votes) if vote.prompt in apart])
    l2 = _choose_l2(train, [prompt for prompt in prompts if prompt not in apart])
    head = train.fit(l2)
    measured = _agreement(test, test.margins(head))
    alone = _agreement(test, _margins_of_models(train.votes, test.votes))
    trained = _agreement(train, train.margins(head))
    description = {
        "features": stored_spec(features, Path(out)),
        "dimensions": all_votes.features.shape[1],
        "l2": l2,
        "votes": len(votes),
        "ties": sum(vote.choice == "tie" for vote in votes),
        "prompts": len(prompts),
        "models": sorted({side.model for vote in votes for side in (vote.left, vote.right)}),
        "voters": dict(Counter(vote.voter for vote in votes)),
        "held_out_prompts": len(apart),
        "held_out_agreement": asdict(measured),
        "held_out_loss": float(vote_loss(test.margins(head), test.outcomes)),
        "models_alone_agreement": asdict(alone),
        "training_agreement": asdict(trained),
    }
    save_head(out, head, description)
    return TrainedHead(head, measured, alone, trained, description)


def _tensors(votes: list[Vote], folder: Path, features: PreferenceFeatures) -> _Votes:
    images = [PromptedImage(vote.prompt, side.image) for vote in votes for side in (vote.left, vote.right)]
    wanted = list(dict.fromkeys(images))
    found: dict[PromptedImage, Tensor] = {}
    with progress_bar(len(wanted), "features of images") as advance, torch.no_grad():
        for keys, batch in image_batches(folder, wanted):
            values = features.compute(batch, [key.prompt for key in keys]).cpu()
            found |= dict(zip(keys, values, strict=True))
            advance(len(keys))
    rows = {key: row for row, key in enumerate(wanted)}
    pairs = torch.tensor([rows[key] for key in images]).view(-1, 2)
    outcomes = torch.tensor([_OUTCOMES[vote.choice] for vote in votes])
    return _Votes(torch.stack([found[key] for key in wanted]), pairs[:, 0], pairs[:, 1], outcomes, votes)


def _choose_l2(train: _Votes, prompts: Sequence[str]) -> float:
    """The penalty with the least loss on votes left out, by cross-validation over prompts."""
    fold = {prompt: place % FOLDS for place, prompt in enumerate(prompts)}
    losses = dict.fromkeys(L2_GRID, 0.0)
    for number in track(range(FOLDS), "cross-validation"):
        inside, outside = (
            train.some([row for row, vote in enumerate(train.votes) if (fold[vote.prompt] == number) is left_out])
            for left_out in (False, True)
        )
        for l2 in L2_GRID:
            margins = outside.margins(inside.fit(l2))
            losses[l2] += float(vote_loss(margins, outside.outcomes)) * len(outside.votes)
    return min(losses, key=lambda l2: losses[l2])


def _agreement(votes: _Votes, margins: Tensor) -> Agreement:
    """With the votes that have a winner; a margin of 0 agrees with none."""
    decided = votes.outcomes != 0.5
    right = (margins > 0) == (votes.outcomes == 1)
    right &= margins != 0
    groups = [vote.prompt for vote, kept in zip(votes.votes, decided.tolist(), strict=True) if kept]
    return agreement(right[decided].numpy(), groups)


def _margins_of_models(train: Sequence[Vote], votes: Sequence[Vote]) -> Tensor:
    """Wins of the left model against the right one in training votes, minus its losses."""
    ahead: Counter[tuple[str, str]] = Counter()
    for vote in train:
        won = 2 * _OUTCOMES[vote.choice] - 1
        ahead[vote.left.model, vote.right.model] += won  # type: ignore[assignment]
        ahead[vote.right.model, vote.left.model] -= won  # type: ignore[assignment]
    return torch.tensor([float(ahead[vote.left.model, vote.right.model]) for vote in votes])


def _warn_of_scorers(votes: Sequence[Vote]) -> None:
    scorers = dict.fromkeys(vote.voter for vote in votes if vote.voter.startswith(SCORER))
    if scorers:
        warnings.warn(
            f"votes of the evaluation scorers {', '.join(scorers)}: a model that is trained on this head must not be "
            "measured with them",
            stacklevel=2,
        )
