"""What the terms with rewards share: their settings, and the scores of latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fewstep.config.base import BatchSize, Fraction, Settings
from fewstep.core.precision import without_autocast
from fewstep.errors import UserError
from fewstep.methods.dmd.terms.base import LossTerm, TermSettings, TermSetup
from fewstep.methods.dmd.terms.planned_rewards import AnyReward, plan_reward
from fewstep.models.frames import check_one_frame
from fewstep.rewards.combine import WeightedRewards
from fewstep.rewards.decode import decode_images
from fewstep.rewards.open import open_reward
from fewstep.rewards.protocol import Reward

if TYPE_CHECKING:
    from fewstep.methods.dmd.config import DMDConfig


class RewardSettings(Settings):
    """One of a term's rewards."""

    reward: str = Field(description='Its name, or "name:argument", such as "pickscore:PATH_OR_HUB_ID".')
    weight: float = Field(1.0, description="Its share in the sum of the rewards; negative is a penalty.")


class ScoredTermSettings(TermSettings):
    """Base of the sections of terms that score the student's images.

    Attributes:
        needs_gradient: whether each reward must have one.
    """

    needs_gradient: ClassVar[bool] = False

    rewards: Annotated[list[RewardSettings], Field(min_length=1)] = Field(
        description="The rewards, each with its weight in their sum; each is normalized by its running mean and "
        "deviation."
    )
    micro_batch: BatchSize = Field(8, description="Images that are decoded and scored at a time; it bounds the memory.")
    max_failures: Fraction = Field(
        0.1, description="Share of recent images that a reward may fail on before the training stops."
    )


def check_groups(term: str, method: DMDConfig) -> None:
    """Raises: ValueError if there are no groups to compare samples within."""
    if method.group_size < 2:
        raise ValueError(f"method.terms.{term} compares samples of one prompt: set method.group_size to 2 or more")


def reward_names(rewards: Sequence[RewardSettings]) -> list[str]:
    """A name for each reward in metrics: that before its argument, numbered where two are the same."""
    names: list[str] = []
    for each in rewards:
        base = each.reward.partition(":")[0]
        same = sum(name == base or name.startswith(f"{base}_") for name in names)
        names.append(f"{base}_{same + 1}" if same else base)
    return names


def score_metrics(rewards: Sequence[RewardSettings]) -> set[str]:
    """The names of :meth:`LatentScorer.metrics`, as ``student/<name>``."""
    return {f"student/{key}" for name in reward_names(rewards) for key in (f"score_{name}", f"unscored_{name}")}


class LatentScorer:
    """Decodes latents and scores them.

    Args:
        decode: latents [B, C, ..., H, W] -> images [B, 3, H, W] in [0, 1], with gradient.
        rewards: called in fp32, whatever the precision of the losses.
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], rewards: WeightedRewards) -> None:
        self.decode, self.rewards = decode, rewards
        self._last: dict[str, Tensor] = {}

    def scores(self, latents: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
        """Each reward's scores, name -> [B], NaN where it failed; with gradient to the latents where they have one."""
        with without_autocast(latents.device):
            found = self.rewards.score(self.decode(latents.float()), texts)
        self._last = {name: each.detach() for name, each in found.items()}
        return found

    @torch.no_grad()
    def combined(self, latents: Tensor, texts: Sequence[str]) -> Tensor:
        """The weighted sum of the normalized scores, [B], NaN where a reward failed. It updates their statistics."""
        with without_autocast(latents.device):
            total = self.rewards(self.decode(latents.float()), texts)
        self._last = self.rewards.scores
        return total

    def metrics(self) -> dict[str, Tensor]:
        """Mean of the last scores and share of samples without one, by reward."""
        found: dict[str, Tensor] = {}
        for name, scores in self._last.items():
            failed = scores.isnan()
            found[f"score_{name}"] = scores.nan_to_num(nan=0.0).sum() / (~failed).sum().clamp(min=1)
            found[f"unscored_{name}"] = failed.float().mean()
        return found

    def frozen_bytes(self) -> dict[str, float]:
        return {"rewards": float(self.rewards.info.parameters)}

    def state_dict(self) -> dict[str, Tensor]:
        return self.rewards.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.rewards.load_state_dict(state)


class ScoredTerm(LossTerm):
    """A term with a scorer, whose metrics and state are its own."""

    scorer: LatentScorer

    def metrics(self) -> dict[str, Tensor]:
        return self.scorer.metrics()

    def frozen_bytes(self) -> dict[str, float]:
        return self.scorer.frozen_bytes()

    def state_dict(self) -> dict[str, Tensor]:
        return self.scorer.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.scorer.load_state_dict(state)


def open_rewards(settings: ScoredTermSettings, key: str, device: torch.device | str) -> list[Reward]:
    """The rewards of a term; on "meta" their shapes alone, which checks them before a model is loaded.

    Args:
        key: of the term in the recipe, for messages.

    Raises:
        UserError: there is no such reward, it cannot be opened, or it has no gradient where one is needed.
    """
    opened = []
    for each in settings.rewards:
        reward = open_reward(each.reward, device)
        if settings.needs_gradient and not reward.info.differentiable:
            raise UserError(
                f"method.terms.{key}.rewards: {each.reward} has no gradient; use it in reward_weighting, grpo or "
                "surrogate, which need none"
            )
        opened.append(reward)
    return opened


def open_scorer(settings: ScoredTermSettings, setup: TermSetup, key: str) -> LatentScorer:
    """The scorer of a term's rewards, on the teacher's device. Arguments and errors as for :func:`open_rewards`."""
    check_one_frame(setup.teacher.generation_config.frames, f"method.terms.{key}.rewards")
    device = setup.dist.device
    if device.type == "meta":
        return _planned(settings, setup)
    weights, names = [each.weight for each in settings.rewards], reward_names(settings.rewards)
    opened = dict(zip(names, zip(open_rewards(settings, key, device), weights, strict=True), strict=True))
    weighted = WeightedRewards(
        opened, settings.micro_batch, max_failures=settings.max_failures, reduce=setup.dist.all_reduce_sum
    )
    return LatentScorer(lambda latents: decode_images(setup.teacher, latents, settings.micro_batch), weighted)


def _planned(settings: ScoredTermSettings, setup: TermSetup) -> LatentScorer:
    """The scorer of a dry run."""
    names = reward_names(settings.rewards)
    planned = {name: (plan_reward(each.reward), 1.0) for name, each in zip(names, settings.rewards, strict=True)}
    if setup.count_passes:
        cheap = {name: (AnyReward(name, reward.info), 1.0) for name, (reward, _) in planned.items()}
        return LatentScorer(lambda latents: latents, WeightedRewards(cheap, settings.micro_batch))
    rewards = WeightedRewards(planned, settings.micro_batch)
    return LatentScorer(lambda latents: decode_images(setup.teacher, latents, settings.micro_batch), rewards)
