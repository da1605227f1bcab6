"""Decoupled Distribution Matching Distillation (arXiv 2511.22677).

Two trainables. The student moves along ``CA + DM``: the spear (CFG augmentation) converts it, the shield (distribution
matching) keeps its images among the teacher's. The fake learns the student's distribution all along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fewstep.core import flow
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import Denoiser, predict_x0
from fewstep.core.method import Method, Trainable
from fewstep.core.samplers import Sampler
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd import monitor
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.rollout import AnchorSchedule, backward_simulation, sample_rollout_timesteps
from fewstep.methods.dmd.terms.cfg_augmentation import cfg_augmentation
from fewstep.methods.dmd.terms.shields import LossTerm, TrainableTerm, distribution_matching, downsample, upsample_grad
from fewstep.methods.trajectory import trajectory_mse

#: What a denoiser is asked: x [B, C, H, W], sigma [B], B prompts.
Question = tuple[Tensor, Tensor, EncodedPrompts]


@dataclass(frozen=True)
class DMDSettings:
    """What the algorithm may be told.

    Attributes:
        anchors: the student's own noise levels before the shift, from 1 down.
        alpha: the teacher's guidance, as in ``null + alpha (cond - null)``.
        spear, shield: weights of CA and DM; 0 switches one off, and saves its forwards.
        scales: (factor, weight) of coarser latents that DM looks at besides; weights are over ``shield``.
        dmd_norm_eps: lower bound of the per-sample normalisers; without one they have given NaNs.
        fake_updates: the fake's moves for each of the student's (the two-time-scale rule of arXiv 2405.14867).
        align_steps: steps in which the student only follows the teacher's way (``trajectory.astray``), before
            spear and shield take over.
        fake_warmup: steps that the fake learns in before they do; a student that is not aligning meanwhile waits.
        fake_follow: share by which the fake is pulled to the student after each step.
        anchor_schedule: "fixed", or "continuous": levels drawn anew at every step (CDM, arXiv 2605.06376).
        sampler, eta: how the student will be run; eta is the sde sampler's share of fresh noise.
    """

    anchors: tuple[float, ...]
    alpha: float
    renoise: Renoise
    spear: float = 1.0
    shield: float = 1.0
    scales: tuple[tuple[int, float], ...] = ()
    dmd_norm_eps: float = 0.1
    fake_updates: int = 5
    align_steps: int = 0
    fake_warmup: int = 0
    fake_follow: float = 0.0
    anchor_schedule: AnchorSchedule = "fixed"
    sampler: Sampler = "euler"
    eta: float = 1.0

    @property
    def sigmas(self) -> list[float]:
        """The anchors after the shift, and the terminal 0."""
        return flow.sigmas_from_timesteps(self.anchors, self.renoise.shift)


def dmd_weight(x0_teacher: Tensor, x: Tensor, floor: float) -> Tensor:
    """``mean|x0_teacher - x|`` of each sample, at least ``floor``: [B, 1, 1, 1] (DMD, arXiv 2311.18828, eq. 8)."""
    return (x0_teacher - x).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=floor)


def pseudo_target_loss(x: Tensor, delta: Tensor) -> Tensor:
    """``1/2 ||x - stop_gradient(x + delta)||^2``, mean over elements: its gradient is ``-delta`` over their number."""
    return 0.5 * (x - (x + delta).detach()).square().mean()


class DecoupledDMD(Method):
    """Decoupled-DMD of a frozen teacher into ``student``, with ``fake`` beside it.

    Teacher, student and fake are denoisers; student and fake are modules too, and the parameters of the teacher take no
    gradient.

    Args:
        null: the encoded empty prompt, a batch of one.
        shields: further shields, each with its weight.
        reference: ``monitor.latent_stats`` of the teacher's own images, for the log; empty leaves the comparison out.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: nn.Module,
        fake: nn.Module,
        null: EncodedPrompts,
        settings: DMDSettings,
        shields: Sequence[tuple[float, LossTerm]] = (),
        reference: Mapping[str, float] | None = None,
    ) -> None:
        self.teacher, self.student, self.fake, self.null, self.settings = teacher, student, fake, null, settings
        self.shields, self.reference = shields, reference
        self.aligning = False
        early = settings.fake_warmup - settings.align_steps if settings.shield else 0
        self.trainables = [Trainable("student", student, self.student_loss, start_step=max(0, early))]
        waits = max(0, settings.align_steps - settings.fake_warmup)
        if settings.shield:  # without distribution matching nobody asks the fake
            self.trainables.append(Trainable("fake", fake, self.fake_loss, settings.fake_updates, waits))
        for _, shield in shields:
            if isinstance(shield, TrainableTerm):
                learn = partial(self.shield_loss, shield)
                self.trainables.append(Trainable(shield.name, shield.module, learn, start_step=waits))

    def student_loss(self, batch: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of the student: ``1/2 ||x - sg(x + CA / n_CA + DM / n_DM)||^2``, and other shields by weight."""
        if self.aligning:
            return torch.stack(trajectory_mse(self.student, batch, self.settings.sigmas)).sum(), {}
        x, anchor = self.one_step(batch.noise, batch.prompts)
        delta, metrics = self.direction(x.detach(), anchor, batch.prompts)
        loss = pseudo_target_loss(x, delta)
        for weight, shield in self.shields:
            held = shield.loss(x, batch)
            loss = loss + weight * held
            metrics[shield.name] = held.detach()
        looks = monitor.latent_stats(x.detach())
        return loss, metrics | looks | (monitor.relative_to(looks, self.reference) if self.reference else {})

    def shield_loss(self, shield: TrainableTerm, batch: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """What a shield's own network learns from fresh images of the student."""
        with torch.no_grad():
            x, _ = self.one_step(batch.noise, batch.prompts)
        return shield.learn(x, batch)

    def fake_loss(self, batch: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow matching of the fake on fresh images of the student, and on coarser ones where it is asked for these."""
        with torch.no_grad():
            x, _ = self.one_step(batch.noise, batch.prompts)
        loss = self.flow_matching(x, batch.prompts)
        for factor, weight in self.settings.scales:
            loss = loss + weight * self.flow_matching(downsample(x, factor), batch.prompts)
        return loss, {}

    def flow_matching(self, x: Tensor, prompts: EncodedPrompts) -> Tensor:
        """How far the fake's velocity is from that between ``x`` and noise, at levels of its own: a scalar."""
        sigma = self.settings.renoise.sample_sigma(x)
        eps = torch.randn_like(x)
        velocity = self.fake(flow.add_noise(x, sigma, eps), sigma, prompts)
        return (velocity - (eps - x)).square().mean()

    def one_step(self, noise: Tensor, prompts: EncodedPrompts) -> tuple[Tensor, Tensor]:
        """The student's data prediction [B, C, H, W] at an anchor drawn for the whole batch, and that anchor [B]."""
        settings = self.settings
        anchors = sample_rollout_timesteps(settings.anchors, settings.anchor_schedule)
        sigmas = [flow.shift_sigma(u, settings.renoise.shift) for u in anchors]
        z = backward_simulation(self.student, noise, sigmas, prompts, settings.sampler, settings.eta)
        sigma = torch.full((len(z),), sigmas[-1], device=z.device)
        x = predict_x0(self.student, z, sigma, prompts)
        return x, torch.full_like(sigma, anchors[-1])

    @torch.no_grad()
    def direction(self, x: Tensor, anchor: Tensor, prompts: EncodedPrompts) -> tuple[Tensor, dict[str, Tensor]]:
        """``CA / n_CA + DM / n_DM`` at the student's images ``x`` [B, C, H, W], and metrics of both."""
        settings = self.settings
        sigma_ca, sigma_dm = settings.renoise.sample_sigmas(anchor)
        x_ca = flow.add_noise(x, sigma_ca, torch.randn_like(x))
        # plain DMD looks at one noisy image, so that spear and shield add up to its guided teacher less the fake
        same = settings.renoise.schedule == "shared" and settings.spear > 0
        x_dm = x_ca if same else flow.add_noise(x, sigma_dm, torch.randn_like(x))
        delta = torch.zeros_like(x)
        metrics: dict[str, Tensor] = {}

        questions: list[Question] = []
        if settings.spear:
            questions += [(x_ca, sigma_ca, prompts), (x_ca, sigma_ca, self.null.repeat(len(x)))]
        if settings.shield and not same:
            questions += [(x_dm, sigma_dm, prompts)]
        answers = iter(self.ask_teacher(questions))

        if settings.spear:
            x0_cond, x0_null = next(answers), next(answers)
            ca = cfg_augmentation(x0_cond, x0_null, settings.alpha)
            delta = delta + settings.spear * ca / dmd_weight(x0_cond, x, settings.dmd_norm_eps)
            metrics["ca"] = ca.abs().mean()
        if settings.shield:
            x0_teacher = x0_cond if same else next(answers)
            x0_fake = predict_x0(self.fake, x_dm, sigma_dm, prompts)
            dm = distribution_matching(x0_teacher, x0_fake)
            delta = delta + settings.shield * dm / dmd_weight(x0_teacher, x, settings.dmd_norm_eps)
            metrics |= {
                "dm": dm.abs().mean(),
                "fake_lag": monitor.fake_score_loss_ratio(x0_fake, x0_teacher, x, sigma_dm),
            }
            for factor, weight in settings.scales:
                coarse = self.coarse_matching(downsample(x, factor), anchor, prompts)
                delta = delta + settings.shield * weight * upsample_grad(coarse, factor)
                metrics[f"dm_{factor}"] = coarse.abs().mean()
        if settings.spear and settings.shield:
            metrics |= monitor.ca_dm_balance(ca, dm)
        return delta, metrics

    def coarse_matching(self, x: Tensor, anchor: Tensor, prompts: EncodedPrompts) -> Tensor:
        """``DM / n_DM`` at the student's images made smaller, with noise of their own."""
        _, sigma = self.settings.renoise.sample_sigmas(anchor)
        noisy = flow.add_noise(x, sigma, torch.randn_like(x))
        x0_teacher = predict_x0(self.teacher, noisy, sigma, prompts)
        dm = distribution_matching(x0_teacher, predict_x0(self.fake, noisy, sigma, prompts))
        return dm / dmd_weight(x0_teacher, x, self.settings.dmd_norm_eps)

    def ask_teacher(self, questions: Sequence[Question]) -> list[Tensor]:
        """The teacher's data predictions for all questions, in one forward."""
        xs, sigmas, prompts = zip(*questions, strict=True)
        x0 = predict_x0(self.teacher, torch.cat(xs), torch.cat(sigmas), EncodedPrompts.concat(prompts))
        return list(x0.split([len(x) for x in xs]))

    def before_step(self, step: int) -> None:
        self.aligning = step < self.settings.align_steps

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float]:
        if self.settings.shield and self.settings.fake_follow:
            pairs = zip(self.fake.parameters(), self.student.parameters(), strict=True)
            for mine, others in pairs:
                mine.lerp_(others, self.settings.fake_follow)
        return {}
