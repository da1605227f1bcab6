"""DMD and its descendants: Decoupled-DMD (arXiv 2511.22677), DMD (2311.18828), DMD2 (2405.14867), CDM (2605.06376).

The student's objective is a sum of loss terms on its own samples. Direction terms (CFG augmentation, distribution
matching) share one pseudo-target loss ``1/2 ||x0 - sg(x0 + sum_i w_i delta_i)||^2``; regularizers add losses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from fewstep.core import flow
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import Denoiser, predict_x0
from fewstep.core.method import BatchSource, Trainable
from fewstep.core.registry import loss_terms, methods
from fewstep.core.schedules import Schedule
from fewstep.data.batch import DistillBatch
from fewstep.methods.base import DataSetup, DistillMethod, MethodSetup
from fewstep.methods.dmd import monitor
from fewstep.methods.dmd.cold_start import DynaRS
from fewstep.methods.dmd.config import DMDConfig, dmd_config_model, first_step
from fewstep.methods.dmd.data import check_whole_groups, dmd_sources, teacher_latent_stats
from fewstep.methods.dmd.normalize import pseudo_target_loss
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.student_sampler import StudentSampler
from fewstep.methods.dmd.terms.base import (
    Collected,
    Direction,
    DirectionTerm,
    Level,
    LossTerm,
    RegularizerTerm,
    Renoised,
    RolloutTerm,
    StudentSample,
    TermSetup,
    WeightingTerm,
)


@dataclass(frozen=True)
class WeightedTerm:
    """A loss term and its weight over the steps."""

    term: LossTerm
    weight: Schedule


@methods.register("dmd")
class DMD(DistillMethod):
    """DMD with a list of loss terms.

    Args:
        teacher: the frozen denoiser.
        sampler: student samples; its ``student`` is the module that is trained.
        null: the encoded empty prompt, a batch of one.
        terms: by name, in the order in which they are computed.
        total_steps: of the training.
        reference: ``monitor.latent_stats`` of the teacher's samples, for metrics; empty leaves the comparison out.
        group_size: samples of one prompt, in a row, in the student's batches.
    """

    alert_rules = monitor.ALERT_RULES

    def __init__(
        self,
        teacher: Denoiser,
        sampler: StudentSampler,
        null: EncodedPrompts,
        renoise: Renoise,
        terms: Mapping[str, WeightedTerm],
        total_steps: int,
        reference: Mapping[str, float] | None = None,
        group_size: int = 1,
    ) -> None:
        self.teacher, self.sampler, self.null, self.renoise = teacher, sampler, null, renoise
        self.terms, self.reference, self.step = terms, reference, 0
        self.group_size = group_size
        trained = [each for each in terms.values() if not isinstance(each.term, WeightingTerm)]
        start = min(first_step(each.weight, total_steps) for each in trained)
        rollouts = [each.term for each in terms.values() if isinstance(each.term, RolloutTerm)]
        self.trainables = [
            Trainable(
                *("student", sampler.student),
                self.compute_collected_loss if rollouts else self.compute_student_loss,
                updates_per_step=max((term.updates for term in rollouts), default=1),
                start_step=start,
                uses_collected=bool(rollouts),
                loss_meaning="how strongly its images are moved; need not fall",
            )
        ]
        for each in terms.values():
            self.trainables += each.term.trainables()

    @classmethod
    def config_model(cls) -> type[DMDConfig]:
        return dmd_config_model()

    @classmethod
    def batch_sources(cls, setup: DataSetup) -> dict[str, BatchSource]:
        return dmd_sources(setup)

    @classmethod
    def build(cls, setup: MethodSetup) -> Self:
        recipe, models, config = setup.recipe, setup.models, setup.recipe.method
        assert isinstance(config, DMDConfig)
        check_whole_groups(recipe.train.batch_size, config.group_size, setup.dist.shard.world_size)
        teacher, student, schedule, steps = models.teacher, recipe.student, config.renoise, recipe.train.steps
        levels = {} if schedule.dyna_rs is None else {"dm_levels": schedule.dyna_rs.resolve(steps)}
        renoise = Renoise(schedule.schedule, teacher.shift, schedule.sigma_min, schedule.sigma_max, **levels)
        sampler = StudentSampler(
            *(models.student.denoiser, student.levels, teacher.shift),
            *(student.timestep_sampling, student.sampler, student.eta),
            trained_levels=student.trained_levels,
            gradient_steps=config.gradient_steps,
            first_step_weight=config.first_step_weight,
        )
        term_setup = TermSetup(
            config=config,
            teacher=teacher,
            student=models.student.denoiser,
            extra=models.extra,
            copies=models.copies,
            null=setup.null,
            renoise=renoise,
            sigmas=sampler.sigmas,
            trained_sigmas=sampler.trained_sigmas,
            batch_size=recipe.train.batch_size,
            total_steps=steps,
            sources=setup.sources,
            dist=setup.dist,
            sample=sampler.fresh,
            endpoint=sampler.endpoint,
            count_passes=setup.count_passes,
        )
        terms = {
            name: WeightedTerm(loss_terms.get(name).build(settings, term_setup), weight)
            for name, (settings, weight) in config.terms.active(steps).items()
        }
        reference = teacher_latent_stats(setup) if recipe.train.on_alert != "off" else {}
        return cls(teacher.denoiser, sampler, setup.null, renoise, terms, steps, reference, config.group_size)

    def before_step(self, step: int) -> None:
        self.step = step
        if isinstance(self.renoise.dm_levels, DynaRS):
            self.renoise.dm_levels.step = step
        for each in self.terms.values():
            each.term.before_step(step)

    def collect(self, batch: DistillBatch) -> Collected:
        grouped, active = batch.grouped(self.group_size), self.active_terms(self.step)
        rollouts = {name: term.collect(grouped) for name, term in active.items() if isinstance(term, RolloutTerm)}
        return Collected(grouped, rollouts)

    def compute_student_loss(self, batch: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """As :meth:`compute_collected_loss`, where no term collects anything."""
        return self.compute_collected_loss(Collected(batch.grouped(self.group_size), {}))

    def compute_collected_loss(self, collected: Collected) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the terms whose weight is positive at this step, and their metrics."""
        batch = collected.batch
        weights = {name: each.weight(self.step) for name, each in self.terms.items()}
        active = self.active_terms(self.step)
        sample = self.sampler(batch) if any(term.uses_sample for term in active.values()) else None
        loss = torch.zeros((), device=batch.noise.device)
        metrics: dict[str, Tensor] = {}

        directions = {name: term for name, term in active.items() if isinstance(term, DirectionTerm)}
        if directions:
            assert sample is not None
            found = self.compute_directions(directions, sample.x0.detach(), sample.anchor, batch.prompts)
            factors, metrics = self._sample_weights(active, weights, sample, batch)
            delta = torch.zeros_like(sample.x0)
            for name, each in found.items():
                weighted = weights[name] * each.delta
                delta = delta + (weighted * flow.append_dims(factors[name], weighted) if name in factors else weighted)
            sample = replace(sample, direction=delta)
            loss = pseudo_target_loss(sample.x0, delta)
            metrics |= self._direction_metrics(found)
        for name, term in active.items():
            if isinstance(term, RegularizerTerm):
                value = term.loss(sample, batch)
            elif isinstance(term, RolloutTerm):
                value = term.loss(collected.rollouts[name])
            else:
                continue
            loss = loss + weights[name] * value
            metrics |= {name: value.detach(), **term.metrics()}
        if sample is not None:
            stats = monitor.latent_stats(sample.x0.detach())
            metrics |= stats | (monitor.relative_to(stats, self.reference) if self.reference else {})
        return loss, metrics

    def _sample_weights(
        self, active: Mapping[str, LossTerm], weights: Mapping[str, float], sample: StudentSample, batch: DistillBatch
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By direction, the product of the weights [B] that the weighting terms give its samples; and their metrics."""
        factors: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for name, term in active.items():
            if not isinstance(term, WeightingTerm):
                continue
            found = term.sample_weights(weights[name], sample, batch)
            if found is None:
                found = torch.ones(len(batch), device=sample.x0.device)
            metrics |= {name: found.mean(), f"{name}_spread": (found - 1).abs().mean(), **term.metrics()}
            for other in term.applies_to or active:
                factors[other] = factors[other] * found if other in factors else found
        return factors, metrics

    @torch.no_grad()
    def compute_directions(
        self, terms: Mapping[str, DirectionTerm], x0: Tensor, anchor: Tensor, prompts: EncodedPrompts
    ) -> dict[str, Direction]:
        """Each term's direction at samples ``x0`` [B, C, ..., H, W] with anchors [B]; one batched teacher forward."""
        sigma_ca, sigma_dm = self.renoise.sample_sigmas(anchor)
        ca = Renoised(flow.add_noise(x0, sigma_ca, torch.randn_like(x0)), sigma_ca)
        # plain DMD renoises once, so that CA and DM add up to its guided teacher less the fake score
        if self.renoise.schedule == "shared" and "cfg_augmentation" in terms:
            dm = ca
        else:
            dm = Renoised(flow.add_noise(x0, sigma_dm, torch.randn_like(x0)), sigma_dm)
        renoised: dict[Level, Renoised] = {"ca": ca, "dm": dm}
        teacher = self.teacher_x0(terms.values(), renoised, prompts)
        return {
            name: term.direction(x0, anchor, prompts, renoised[term.level], teacher[term])
            for name, term in terms.items()
        }

    def teacher_x0(
        self, terms: Collection[DirectionTerm], renoised: Mapping[Level, Renoised], prompts: EncodedPrompts
    ) -> dict[DirectionTerm, list[Tensor]]:
        """The teacher's data predictions that each term needs, all in one forward; equal inputs are computed once."""
        null = self.null.repeat(len(prompts))
        inputs: dict[tuple[int, str], tuple[Renoised, EncodedPrompts]] = {}
        for term in terms:
            for prompt in term.teacher_prompts:
                at = renoised[term.level]
                inputs[id(at), prompt] = at, prompts if prompt == "cond" else null
        if not inputs:
            return {term: [] for term in terms}
        x0 = predict_x0(
            self.teacher,
            torch.cat([at.x for at, _ in inputs.values()]),
            torch.cat([at.sigma for at, _ in inputs.values()]),
            EncodedPrompts.concat([given for _, given in inputs.values()]),
        )
        computed = dict(zip(inputs, x0.split(len(prompts)), strict=True))
        return {term: [computed[id(renoised[term.level]), p] for p in term.teacher_prompts] for term in terms}

    def _direction_metrics(self, directions: Mapping[str, Direction]) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        for each in directions.values():
            metrics |= each.metrics
        if {"cfg_augmentation", "distribution_matching"} <= directions.keys():
            ca, dm = directions["cfg_augmentation"].raw, directions["distribution_matching"].raw
            metrics |= monitor.ca_dm_balance(ca, dm)
        return metrics

    def after_step(self, step: int) -> dict[str, float]:
        for each in self.terms.values():
            each.term.after_step(step)
        return {}

    def frozen_bytes(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, size in (item for each in self.terms.values() for item in each.term.frozen_bytes().items()):
            found[name] = found.get(name, 0.0) + size
        return {name: size for name, size in found.items() if size}

    def state_dict(self) -> dict[str, Tensor]:
        """The terms' states, as ``<term>.<name>``."""
        return {
            f"{name}.{key}": value for name, each in self.terms.items() for key, value in each.term.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, each in self.terms.items():
            own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            each.term.load_state_dict(own)

    def dry_run(self, batch: DistillBatch) -> Iterator[tuple[Trainable, Callable[[], Tensor]]]:
        """All losses, once for each set of terms that is on at some step: their graphs are in memory together."""
        seen: set[frozenset[str]] = set()
        for step in sorted({step for each in self.terms.values() for step in each.weight.breakpoints}):
            names = frozenset(self.active_terms(step))
            if names not in seen:
                seen.add(names)
                self.before_step(step)
                yield from super().dry_run(batch)

    def active_terms(self, step: int) -> dict[str, LossTerm]:
        """The terms by name whose weight is positive at a step."""
        return {name: each.term for name, each in self.terms.items() if each.weight(step) > 0}
