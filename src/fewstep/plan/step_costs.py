"""The only part of a plan that depends on the method: its losses, run on the meta device, and its passes a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fewstep.config.recipe import DistillRecipe
from fewstep.config.student_schedule import student_timesteps
from fewstep.core import flow
from fewstep.core.conditioning import EncodedPrompts
from fewstep.data.batch import DistillBatch
from fewstep.jobs import dmd_config
from fewstep.methods.dmd.method import DecoupledDMD
from fewstep.methods.models_setup import Models
from fewstep.methods.trajectory import trajectory_mse
from fewstep.plan.communication import forward_counts


@dataclass
class StepCosts:
    """One training step of a method.

    Attributes:
        modules: the trainable parts by name.
        losses: by trainable part, the losses of which the largest determines the memory of its update.
        forwards, backwards: passes of all denoisers, mean over the anchors.
        forward_batches: the same forwards counted in batches, as a forward may take several at once.
    """

    modules: dict[str, nn.Module]
    losses: dict[str, list[Callable[[], Tensor]]] = field(default_factory=dict)
    forwards: float = 0.0
    backwards: float = 0.0
    forward_batches: float = 0.0


def step_costs(recipe: DistillRecipe, models: Models, noise: Tensor, prompts: EncodedPrompts) -> StepCosts:
    """The costs of the recipe's method on a batch of ``noise`` [B, C, H, W], which may be on the meta device."""
    sigmas = flow.sigmas_from_timesteps(student_timesteps(recipe), models.teacher.shift)
    batch = DistillBatch(noise, prompts, noise[:, None].expand(-1, len(sigmas) - 1, *noise.shape[1:]))
    follow = lambda: torch.stack(trajectory_mse(models.student.denoiser, batch, sigmas)).sum()  # noqa: E731
    costs = StepCosts({"student": models.student.denoiser}, {"student": []})
    if recipe.method == "trajectory" or recipe.align:
        costs.losses["student"].append(follow)
    if recipe.method != "dmd":
        costs.forwards = costs.backwards = costs.forward_batches = recipe.student.steps
        return costs
    settings = dmd_config(recipe, models.teacher.shift)
    # a rollout runs without gradients: two anchors need as much memory as many
    settings = replace(settings, anchors=settings.anchors[:2])
    denoisers = models.teacher.denoiser, models.student.denoiser, models.fake
    method = DecoupledDMD(*denoisers, prompts[:1], settings)
    costs.losses["student"].append(lambda: method.student_loss(batch)[0])
    trains_fake = recipe.shield.enabled and bool(recipe.shield.weight)
    if trains_fake:
        costs.modules["fake"] = models.fake
        costs.losses["fake"] = [lambda: method.fake_loss(batch)[0]]
    counts = forward_counts(recipe.student.steps, recipe.fake_updates if trains_fake else 0)
    costs.forwards, costs.backwards = counts.forwards, counts.backwards
    costs.forward_batches = costs.forwards + 2  # the teacher's forward takes three batches
    return costs
