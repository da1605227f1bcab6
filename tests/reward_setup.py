"""Rewards whose optimum is known, on latents that are their own images."""

import math

import torch

from fewstep.methods.dmd.terms.scoring import LatentScorer
from fewstep.rewards.combine import WeightedRewards
from fewstep.rewards.protocol import RewardInfo


class Quadratic:
    """``-1/2 mean (x - goal)^2`` over the elements of each sample; best where all are ``goal``."""

    name = "quadratic"

    def __init__(self, goal, differentiable=True):
        self.goal = goal
        self.info = RewardInfo(differentiable, (-math.inf, 0.0), "none")
        self.prompts = []

    def __call__(self, images, prompts):
        self.prompts.append(list(prompts))
        return -0.5 * (images - self.goal).square().flatten(1).mean(dim=1)


class Linear:
    """The mean over the elements of each sample, times a slope: its gradient is the same everywhere."""

    name = "linear"
    info = RewardInfo(True, (-math.inf, math.inf), "none")

    def __init__(self, slope=1.0):
        self.slope = slope

    def __call__(self, images, prompts):
        return self.slope * images.flatten(1).mean(dim=1)


class Failing:
    """NaN for every sample whose prompt is "bad"."""

    name = "failing"
    info = RewardInfo(True, (-math.inf, math.inf), "none")

    def __call__(self, images, prompts):
        bad = torch.tensor([prompt == "bad" for prompt in prompts])
        return torch.where(bad, math.nan, images.flatten(1).mean(dim=1))


def scorer_of(*rewards, normalize=True, **options):
    """A scorer of latents as they are; rewards are numbered, each with weight 1."""
    named = {f"r{index}": (reward, 1.0) for index, reward in enumerate(rewards)}
    return LatentScorer(lambda latents: latents, WeightedRewards(named, 64, normalize=normalize, **options))
