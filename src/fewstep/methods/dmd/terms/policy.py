"""The policy gradient on a student's stochastic steps: what every GRPO term shares, whatever its reward.

RTDMD (arXiv 2605.26108): the coefficient-preserving stochastic step with its last step deterministic, log-probabilities
as means over dimensions, a narrow clip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.config.base import Updates
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.global_rng import shared_draws
from fewstep.core.samplers import SamplerStep, iterate, normal_log_prob, sde_mean_std
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.terms.base import RolloutTerm, TermSettings
from fewstep.methods.dmd.terms.scoring import check_groups
from fewstep.methods.rl.grpo import gaussian_kl, policy_loss

if TYPE_CHECKING:
    from fewstep.config.recipe import Stage
    from fewstep.methods.dmd.config import DMDConfig

REFERENCE = "reference"  # the student as it was when the training began


class PolicySettings(TermSettings):
    """Settings that GRPO terms share."""

    eta: Annotated[float, Field(gt=0, le=1)] = Field(0.9, description="Share of fresh noise in the stochastic steps.")
    trained_steps: Updates = Field(2, description="Stochastic steps that are trained, drawn anew for each rollout.")
    clip: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5, description="Largest distance of the probability ratio from 1."
    )
    updates: Updates = Field(1, description="Updates of the student on each rollout; the clip acts from the second on.")
    kl_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Weight of the KL divergence from the student as it was at first; 0 leaves DM as the anchor."
    )
    advantage_bound: Annotated[float, Field(gt=0)] = Field(5.0, description="Largest magnitude of an advantage.")
    std_floor: Annotated[float, Field(gt=0)] = Field(
        0.1, description="Least deviation of the scores that is divided by, in running deviations of the reward."
    )

    def check_policy(self, term: str, stage: Stage, method: DMDConfig) -> None:
        """Raises: ValueError if the student's steps, groups or anchor do not fit."""
        check_groups(term, method)
        if self.trained_steps > stage.student.steps - 1:
            raise ValueError(
                f"method.terms.{term}.trained_steps {self.trained_steps}: {stage.student.steps} steps have "
                f"{stage.student.steps - 1} stochastic ones"
            )
        if not self.kl_weight and "distribution_matching" not in method.terms.active(stage.train.steps):
            raise ValueError(
                f"method.terms.{term}: without distribution_matching or kl_weight nothing keeps the student from "
                "exploiting the reward; give one of them a weight"
            )


@dataclass(frozen=True)
class Rollout:
    """A batch's rollout: the stochastic steps that are trained, and the advantages [B] of each step's samples."""

    steps: Sequence[SamplerStep]
    prompts: EncodedPrompts
    advantages: Sequence[Tensor]


def stochastic_rollout(
    student: nn.Module, batch: DistillBatch, sigmas: Sequence[float], eta: float
) -> list[SamplerStep]:
    """The steps of the student's whole rollout from the batch's noise."""
    return list(iterate(student, batch.noise, sigmas, batch.prompts, sampler="sde", eta=eta))


class PolicyTerm(RolloutTerm):
    """
    sigmas: the student's noise levels from 1 down, with the terminal 0.
    reference: the student as it was at first, for ``kl_weight``.
    name: prefix of its metrics.
    """

    def __init__(
        self,
        student: nn.Module,
        sigmas: Sequence[float],
        settings: PolicySettings,
        reference: nn.Module | None,
        name: str,
    ) -> None:
        self.student, self.sigmas, self.policy, self.reference = student, list(sigmas), settings, reference
        self.name, self.updates = name, settings.updates
        self._metrics: dict[str, Tensor] = {}

    @classmethod
    def student_copies(cls, settings: TermSettings) -> tuple[str, ...]:
        assert isinstance(settings, PolicySettings)
        return (REFERENCE,) if settings.kl_weight else ()

    def simulate(self, batch: DistillBatch) -> list[SamplerStep]:
        return stochastic_rollout(self.student, batch, self.sigmas, self.policy.eta)

    def drawn(self, stochastic: Sequence[SamplerStep]) -> list[SamplerStep]:
        """Some of the stochastic steps, in order; the same on all processes."""
        with shared_draws():
            order = torch.rand(len(stochastic)).argsort().tolist()
        return [stochastic[index] for index in sorted(order[: self.policy.trained_steps])]

    def loss(self, collected: Rollout) -> Tensor:
        loss = torch.zeros((), device=collected.prompts.features.device)
        ratios, divergences = [], []
        for step, advantages in zip(collected.steps, collected.advantages, strict=True):
            mean = self._mean(self.student, step, collected.prompts)
            log_prob = normal_log_prob(step.x_next, mean, step.std)
            assert step.log_prob is not None
            loss = loss + policy_loss(log_prob, step.log_prob, advantages, self.policy.clip)
            ratios.append((log_prob.detach() - step.log_prob).exp().sub(1).abs().mean())
            if self.reference is not None:
                with torch.no_grad():
                    kept = self._mean(self.reference, step, collected.prompts)
                divergence = gaussian_kl(mean, kept, step.std).mean()
                loss = loss + self.policy.kl_weight * divergence
                divergences.append(divergence.detach())
        if not collected.steps:
            self._metrics = {}
            return loss
        self._metrics = {
            f"{self.name}_advantage_abs": torch.stack(list(collected.advantages)).abs().mean(),
            f"{self.name}_ratio_diff": torch.stack(ratios).mean(),
        }
        if divergences:
            self._metrics[f"{self.name}_kl"] = torch.stack(divergences).mean()
        return loss / len(collected.steps)

    def _mean(self, denoiser: Callable[..., Tensor], step: SamplerStep, prompts: EncodedPrompts) -> Tensor:
        """The mean of a step's state under a denoiser."""
        sigma = torch.full((len(step.x),), step.sigma, device=step.x.device)
        velocity = denoiser(step.x, sigma, prompts)
        return sde_mean_std(step.x, step.sigma, step.sigma_next, velocity, self.policy.eta)[0]

    def metrics(self) -> dict[str, Tensor]:
        return self._metrics


def policy_metrics(name: str, settings: PolicySettings) -> set[str]:
    """The names of a policy term's metrics."""
    keys = ("", "_advantage_abs", "_ratio_diff", *(("_kl",) if settings.kl_weight else ()))
    return {f"student/{name}{key}" for key in keys}
