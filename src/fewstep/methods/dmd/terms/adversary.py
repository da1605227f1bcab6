"""The discriminator of AdvDMD: trained on all states of the student's stochastic rollout, it becomes the reward.

AdvDMD (arXiv 2604.28126) gives the idea: DMD2's discriminator, trained online on intermediate and final states, is the
reward. Layout, losses, calibration and constants are ours.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Self

import torch
from pydantic import Field
from torch import Tensor

from fewstep.config.base import BatchSize, Settings
from fewstep.config.schedule import Step, resolve_step
from fewstep.core import flow
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import FeatureExtractor
from fewstep.core.method import Trainable
from fewstep.core.samplers import SamplerStep
from fewstep.data.batch import DistillBatch
from fewstep.methods.adversarial.conditions import condition_of
from fewstep.methods.adversarial.gate import Gate
from fewstep.methods.adversarial.heads import Depths, DiscriminatorHeads, score_of
from fewstep.methods.adversarial.losses import Loss, discriminator_loss, gradient_penalty
from fewstep.methods.adversarial.replay import Pairs, Replay
from fewstep.methods.dmd.terms.base import TermSetup
from fewstep.rewards.moments import RunningMoments
from fewstep.training.distributed import DistContext

if TYPE_CHECKING:
    from fewstep.config.recipe import Stage
    from fewstep.methods.dmd.config import DMDConfig

LEAST_DEVIATION = 0.01  # of logits at a step, that scores are divided by: smaller ones are no judgment
MOMENTS_WINDOW = 1024  # generated samples at a step, for their mean and deviation

#: What is logged of every discriminator, besides ``auc_<step>``, ``auc_low_<step>`` and ``auc_<condition>``.
ADVERSARY_METRICS = {f"discriminator/{name}" for name in ("accuracy", "r1", "auc", "auc_low")}

Share = Annotated[float, Field(gt=0, lt=1)]


class AdversarySettings(Settings):
    """The discriminator, and the gate before its use as a reward."""

    depths: Depths = Field(
        [0.25, 0.5, 0.75], description="Shares of the teacher's layers, ascending, after which there is a head."
    )
    hidden: BatchSize = Field(128, description="Width of the heads.")
    loss: Loss = Field("hinge", description="Of the discriminator: hinge or logistic.")
    r1_weight: Annotated[float, Field(ge=0)] = Field(100.0, description="Weight of the approximate R1 penalty.")
    r1_sigma: Annotated[float, Field(gt=0)] = Field(
        0.01, description="Deviation of the noise that the penalty adds to real states."
    )
    final_sigma: Share = Field(0.1, description="Noise level at which final states are compared and scored.")
    final_share: Share = Field(
        0.5, description="Share of the samples whose final state is compared; of the others one intermediate state."
    )
    pretraining: Step = Field("50%", description="Step before which the discriminator is trained alone, with replay.")
    replay: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="Share of earlier samples in the discriminator's batches during pretraining."
    )
    replay_size: BatchSize = Field(64, description="Earlier samples that are kept, with real ones and prompts.")
    held_out: Share = Field(0.25, description="Share of the prompts that the discriminator is tested on, not trained.")
    threshold: Annotated[float, Field(ge=0.5, lt=1)] = Field(
        0.65, description="Held-out AUC, as a bound from below, that a step's states need to be a reward."
    )
    confidence: Share = Field(0.95, description="Confidence of that bound, by bootstrap.")
    window: BatchSize = Field(128, description="Newest held-out pairs of each step that AUC is measured on.")
    least_pairs: Annotated[int, Field(ge=8)] = Field(32, description="Pairs of a step before its AUC is used.")
    patience: BatchSize = Field(
        50, description="Steps in a row with the gate closed, once it was open, after which the policy stops for good."
    )

    def check(self, term: str, stage: Stage, method: DMDConfig) -> None:
        """Raises: ValueError if the settings contradict each other or another term."""
        key = f"method.terms.{term}.adversary"
        if self.least_pairs > self.window:
            raise ValueError(f"{key}.least_pairs {self.least_pairs} is above window {self.window}: it would never open")
        start = resolve_step(self.pretraining, stage.train.steps)
        if start >= stage.train.steps:
            raise ValueError(f"{key}.pretraining: step {start} is not below train.steps {stage.train.steps}")
        if stage.student.steps < 2:
            raise ValueError(f"method.terms.{term}: a student of 1 step has no stochastic step; use reward or gan")
        others = [name for name in ("gan", "adversarial_grpo", "adversarial_surrogate") if name != term]
        found = [name for name in others if name in method.terms.on]
        if found:
            raise ValueError(f"method.terms: {term} and {found[0]} each train a discriminator; leave one of them out")


class Adversary:
    """
    extractor: the teacher; nothing in it is trained.
    simulate: a batch -> the steps of the student's stochastic rollout, to the terminal 0.
    sigmas: the student's noise levels from 1 down, with the terminal 0.
    pretraining: step at which replay ends and the gate may open.
    start_step: of the discriminator's training.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        heads: DiscriminatorHeads,
        simulate: Callable[[DistillBatch], Sequence[SamplerStep]],
        sigmas: Sequence[float],
        settings: AdversarySettings,
        pretraining: int = 0,
        start_step: int = 0,
        dist: DistContext | None = None,
    ) -> None:
        self.extractor, self.heads, self.simulate, self.settings = extractor, heads, simulate, settings
        self.levels = [*sigmas[1:-1], settings.final_sigma]
        self.pretraining, self.start_step, self.dist = pretraining, start_step, dist or DistContext()
        self.step = 0
        gate = settings.threshold, settings.confidence, settings.window, settings.least_pairs, settings.patience
        self.gate = Gate(len(self.levels), *gate)
        self.replay = Replay(settings.replay_size)
        reduce = self.dist.all_reduce_sum
        self.moments = [RunningMoments(MOMENTS_WINDOW, reduce) for _ in self.levels]

    def trainable(self) -> Trainable:
        return Trainable(
            *("discriminator", self.heads, self.compute_loss),
            start_step=self.start_step,
            loss_meaning="2 where it cannot tell real from generated states, less where it can",
        )

    @property
    def planned(self) -> bool:
        """Whether this is a dry run, in which the gate is open: it must count what an open gate costs."""
        return self.dist.device.type == "meta"

    @property
    def open(self) -> list[bool]:
        """Whether the states after each of the student's steps may be rewarded."""
        if self.planned:
            return [True] * len(self.levels)
        return [each and self.step >= self.pretraining for each in self.gate.open]

    def compute_loss(self, batch: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss on one state of each sample's rollout; held-out prompts measure it instead."""
        pairs, held_out = self._pairs(batch)
        sigma, eps = self._sigma(pairs.step), torch.randn_like(pairs.real)
        real = flow.add_noise(pairs.real, sigma, eps)
        perturbed = real + self.settings.r1_sigma * torch.randn_like(real)
        d_fake, d_real, d_perturbed = (
            self._logits(x, sigma, pairs.prompts) for x in (pairs.fake.to(real.dtype), real, perturbed)
        )
        condition = torch.tensor([condition_of(text) for text in batch.texts], device=held_out.device)
        self._measure(pairs.step, d_real, d_fake, held_out, condition)
        trained = (~held_out).float()
        penalty = gradient_penalty(d_real, d_perturbed)
        each = discriminator_loss(d_real, d_fake, self.settings.loss) + self.settings.r1_weight * penalty
        # a mean over the trained rows of all processes, whose gradients are averaged afterwards
        ones = torch.ones((), device=trained.device)
        counts = self.dist.all_reduce_sum(torch.stack([trained.sum(), ones]))
        rows = (counts[0] / counts[1]).clamp(min=1e-6)
        right = ((score_of(d_fake) < 0).float() + (score_of(d_real) > 0).float()) / 2
        metrics = {"accuracy": (trained * right).sum() / rows, "r1": (trained * penalty.detach()).sum() / rows}
        return (trained * each).sum() / rows, metrics | self.gate.metrics()

    @torch.no_grad()
    def _pairs(self, batch: DistillBatch) -> tuple[Pairs, Tensor]:
        """A state of each sample's rollout beside a real sample, and which of them are held out; with replay."""
        states = torch.stack(self.scored_states(self.simulate(batch), torch.randn_like(batch.noise)))
        count, device = len(batch), batch.noise.device
        step = self._drawn_steps(count).to(device)
        replaced, drawn = torch.rand(count) < self.settings.replay, torch.rand(count)
        fresh = Pairs(states[step, torch.arange(count, device=device)], batch.real, step, batch.prompts)
        held_out = torch.tensor([is_held_out(text, self.settings.held_out) for text in batch.texts], device=device)
        if self.step >= self.pretraining or fresh.fake.is_meta:
            return fresh, held_out
        mixed = self.replay.mix(fresh, replaced & ~held_out.cpu(), drawn)
        for kept in self.dist.all_gather_rows(fresh[torch.arange(count)[~held_out.cpu()]].to("cpu")):
            self.replay.add(kept)
        return mixed, held_out

    def _drawn_steps(self, count: int) -> Tensor:
        """The step of the student's whose state is compared, for each sample: [count]. Intermediate states, which are
        mostly noise, tell the discriminator little."""
        final = len(self.levels) - 1
        return torch.where(torch.rand(count) < self.settings.final_share, final, torch.randint(final, (count,)))

    def _measure(self, step: Tensor, real: Tensor, fake: Tensor, held_out: Tensor, condition: Tensor) -> None:
        """Keeps the scores of held-out pairs, and the moments of generated samples' scores."""
        if real.is_meta:
            return
        columns = step.float(), held_out.float(), score_of(real), score_of(fake), condition.float()
        rows = torch.stack(columns, dim=1)
        with torch.no_grad():
            rows = self.dist.all_gather(rows)
        kept = rows[rows[:, 1] > 0]
        self.gate.add(kept[:, 0], kept[:, 2], kept[:, 3], kept[:, 4])
        for index, moments in enumerate(self.moments):
            moments.update(score_of(fake)[(step == index) & held_out])  # own rows, summed over processes

    def scored_states(self, made: Sequence[SamplerStep], eps: Tensor) -> list[Tensor]:
        """The states after each step at ``levels``; the final one is noised with ``eps``."""
        final = made[-1].x_next
        return [*(step.x_next for step in made[:-1]), flow.add_noise(final, self.levels[-1], eps)]

    @torch.no_grad()
    def scores(self, made: Sequence[SamplerStep], prompts: EncodedPrompts, group_size: int) -> Tensor:
        """The calibrated scores of a rollout's states, [steps, B]: less the mean of held-out samples of the student
        after the same step, over their deviation, so that those of different steps can be added."""
        final, found = made[-1].x_next, []
        # one noise on the final states of a group, so that they compare
        eps = torch.randn_like(final)[[row - row % group_size for row in range(len(final))]]
        for state, level, moments in zip(self.scored_states(made, eps), self.levels, self.moments, strict=True):
            sigma = torch.full((len(state),), level, device=state.device)
            score = score_of(self._logits(state, sigma, prompts))
            found.append((score - moments.mean) / max(moments.deviation, LEAST_DEVIATION))
        return torch.stack(found)

    def _logits(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        """[B, heads, L], with gradient to the heads alone."""
        with torch.no_grad():
            features = self.extractor.features(x, sigma, prompts, self.settings.depths)
        return self.heads(features, sigma)

    def _sigma(self, step: Tensor) -> Tensor:
        return torch.tensor(self.levels, device=step.device)[step]

    def before_step(self, step: int) -> None:
        self.step = step

    def after_step(self, step: int) -> None:
        if step > self.start_step:
            self.gate.update(step, step >= self.pretraining)

    @classmethod
    def build(
        cls, settings: AdversarySettings, setup: TermSetup, simulate: Callable[[DistillBatch], Sequence[SamplerStep]]
    ) -> Self:
        """With new heads on the teacher, the same on all processes."""
        teacher = setup.teacher.denoiser
        heads = DiscriminatorHeads(teacher.feature_dim, len(settings.depths), settings.hidden)
        setup.dist.broadcast(heads.to(setup.teacher.device))
        pretraining = resolve_step(settings.pretraining, setup.total_steps)
        start = setup.config.fake_score_start_step(setup.total_steps)
        return cls(teacher, heads, simulate, setup.sigmas, settings, pretraining, start, setup.dist)

    def state_dict(self) -> dict[str, Tensor]:
        parts = {"gate": self.gate.state_dict(), "replay": self.replay.state_dict()}
        state = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
        return state | {"moments": torch.stack([moments.state() for moments in self.moments])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for part in (self.gate, self.replay):
            prefix = "gate." if part is self.gate else "replay."
            part.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        for moments, row in zip(self.moments, state["moments"], strict=True):
            moments.load(row)


def is_held_out(text: str, share: float) -> bool:
    """Whether a prompt is among the ``share`` of all prompts that the discriminator is not trained on; it depends on
    the text alone."""
    return zlib.crc32(text.encode()) < share * 2**32
