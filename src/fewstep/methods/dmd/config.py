"""The config section of method dmd: its loss terms by name, the renoise schedule, the fake score."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, create_model, model_validator

from fewstep.config.base import BatchSize, Fraction, Settings, Updates
from fewstep.config.method import MethodConfig
from fewstep.config.schedule import Step, resolve_step
from fewstep.config.sections import RealStreamSettings
from fewstep.core.registry import image_sources, loss_terms
from fewstep.core.schedules import Schedule
from fewstep.data.real_stream import shard_files
from fewstep.methods.dmd.cold_start import DynaRSSettings
from fewstep.methods.dmd.refused import check_refused
from fewstep.methods.dmd.terms.base import LossTerm, TermSettings, WeightingTerm
from fewstep.methods.dmd.terms.scoring import ScoredTermSettings, open_rewards

if TYPE_CHECKING:
    from fewstep.config.recipe import Stage


# Metrics of the student, beside those of the terms.
SAMPLE_METRICS = ("student/x0_mean", "student/x0_std", "student/x0_nyquist")
RELATIVE_METRICS = ("student/x0_mean_diff", "student/x0_std_ratio", "student/x0_nyquist_ratio")  # to the teacher's
STEP_METRICS = ("student/ca_dm_cosine", "student/ca_dm_ratio")


class RenoiseSettings(Settings):
    """The renoise schedule and the range of its noise levels."""

    schedule: Literal["shared", "full", "constrained", "hybrid"] = Field(
        default="hybrid", description="Where the noise levels of CA and DM are drawn (arXiv 2511.22677)."
    )
    sigma_min: Fraction = Field(default=0.02, description="Lowest sigma drawn.")
    sigma_max: Fraction = Field(default=0.98, description="Highest sigma drawn.")
    dyna_rs: DynaRSSettings | None = Field(
        None, description="DynaRS: DM and the fake score's loss begin at high noise levels (DMDR); null is off."
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min:g} is not below sigma_max {self.sigma_max:g}")
        return self


class TermsSection(Settings):
    """The terms by name; one that is left out, null or of constant weight 0 is off."""

    @model_validator(mode="before")
    @classmethod
    def _check_refused(cls, tree: Any) -> Any:
        if isinstance(tree, Mapping):
            check_refused(tree)
        return tree

    @property
    def on(self) -> dict[str, TermSettings]:
        """Settings of each term whose weight is positive at some step, in registry order."""
        found: dict[str, TermSettings | None] = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: each for name, each in found.items() if each is not None and each.weight.is_on}

    def active(self, total_steps: int) -> dict[str, tuple[TermSettings, Schedule]]:
        """Settings and weight schedule of the terms that are on. Raises: ValueError that names a wrong schedule."""
        found = {}
        for name, settings in self.on.items():
            try:
                found[name] = settings, settings.weight.resolve(total_steps)
            except ValueError as error:
                raise ValueError(f"method.terms.{name}.weight: {error}") from None
        return found


class DMDConfig(MethodConfig):
    """DMD, DMD2, CDM and Decoupled-DMD are settings of this section."""

    name: Literal["dmd"]
    terms: TermsSection = Field(description="Loss terms of the student's objective, by name.")
    renoise: RenoiseSettings = Field(default_factory=RenoiseSettings, description="The renoise schedule.")
    group_size: BatchSize = Field(
        default=1, description="Samples of one prompt, in a row, in the batches of the student; for terms with groups."
    )
    gradient_steps: Literal["last", "all"] = Field(
        default="last",
        description="Steps of the student's rollout that gradients reach; all: each is computed once more for it.",
    )
    first_step_weight: Annotated[float, Field(ge=0, le=1000)] = Field(
        default=1.0,
        description="How often the first step's prediction is trained for its own loss, relative to that of each later "
        "step; 0 needs gradient_steps: all.",
    )
    fake_score_updates: Updates = Field(default=5, description="Updates of the fake score for each of the student.")
    fake_score_start: Step = Field(
        default=0, description="Step at which the fake score (and a discriminator) start training: before DM does."
    )
    fake_score_ema_to_student: Fraction = Field(
        default=0.0, description="Share by which the fake score's weights move to the student's after each step."
    )
    dmd_norm_eps: Annotated[float, Field(gt=0)] = Field(
        default=0.1, description="Lower bound of the per-sample normalizers."
    )
    real_source: str = Field(
        default="teacher",
        description="Real latents of the terms that need them: teacher; an image source such as emoji; or WebDataset "
        "shards of latents or images with prompts: a .tar file, several as latents-{000..099}.tar, or a folder.",
    )
    real_stream: RealStreamSettings = Field(
        default_factory=RealStreamSettings, description="How shards of real latents or images are read."
    )
    num_real_images: int = Field(
        default=1024,
        ge=2,
        le=10**7,
        description="Images from an image source; of the teacher: trajectory.num_trajectories.",
    )

    def _terms(self) -> dict[str, type[LossTerm]]:
        """Classes of the terms that are on."""
        return {name: loss_terms.get(name) for name in self.terms.on}

    def trainable_parts(self) -> list[str]:
        return ["student", *(part for term in self._terms().values() for part in term.trainable_names)]

    def extra_models(self) -> list[str]:
        return [name for term in self._terms().values() for name in term.model_names]

    def student_copies(self) -> list[str]:
        found: dict[str, None] = {}
        for term, settings in self.terms.on.items():
            found |= dict.fromkeys(loss_terms.get(term).student_copies(settings))
        return list(found)

    def trained_rewards(self) -> dict[str, float] | None:
        scored = [each for each in self.terms.on.values() if isinstance(each, ScoredTermSettings)]
        found = {reward.reward: reward.weight for settings in scored for reward in settings.rewards}
        learned = any(term.learns_reward for term in self._terms().values())
        return found if found or learned else None

    def check_files(self) -> None:
        if self.streams_real:
            shard_files(self.real_source)
        for name, settings in self.terms.on.items():
            if isinstance(settings, ScoredTermSettings):
                open_rewards(settings, name, "meta")

    def further_prompts(self) -> dict[str, Sequence[str]]:
        found = {f"method.terms.{name}": settings.further_prompts() for name, settings in self.terms.on.items()}
        return {key: prompts for key, prompts in found.items() if prompts}

    @property
    def requires_real(self) -> bool:
        """Whether training batches must bring real latents."""
        return any(term.requires_real for term in self._terms().values())

    @property
    def measures_real(self) -> bool:
        """Whether real latents are needed at all."""
        return any(term.requires_real or term.measures_real for term in self._terms().values())

    @property
    def samples_teacher(self) -> bool:
        return self.measures_real and self.real_source == "teacher"

    @property
    def streams_real(self) -> bool:
        return self.measures_real and self.real_source != "teacher" and self.real_source not in image_sources

    def fake_score_start_step(self, total_steps: int) -> int:
        return resolve_step(self.fake_score_start, total_steps)

    def metric_names(self, stage: Stage) -> set[str] | None:
        active = self.terms.active(stage.train.steps)
        terms = {name: loss_terms.get(name) for name in active}
        names = set(STEP_METRICS if {"cfg_augmentation", "distribution_matching"} <= terms.keys() else ())
        if any(term.uses_sample for term in terms.values()):
            names |= {*SAMPLE_METRICS, *(RELATIVE_METRICS if stage.train.on_alert != "off" else ())}
        for name, term in terms.items():
            known = term.metric_names(active[name][0])
            if known is None:
                return None
            names |= known
        return names

    def check(self, stage: Stage) -> None:
        steps = stage.train.steps
        active = self.terms.active(steps)
        trained = {name: each for name, each in active.items() if not issubclass(loss_terms.get(name), WeightingTerm)}
        if not trained:
            raise ValueError("method.terms: no term has a weight, the student would not be trained")
        for name, (_, weight) in active.items():
            if weight.breakpoints[-1] > steps:
                raise ValueError(
                    f"method.terms.{name}.weight changes at step {weight.breakpoints[-1]}, after the last of {steps}"
                )
        if self.real_source != "teacher" and not self.measures_real:
            raise ValueError(f"method.real_source {self.real_source}: no term needs real latents; leave it out")
        if self.streams_real and self.num_real_images != type(self).model_fields["num_real_images"].default:
            raise ValueError(
                "method.num_real_images: no effect on shards, which are read whole; set method.real_source to an image "
                "source, or leave it out"
            )
        if not self.streams_real and self.real_stream != RealStreamSettings():
            raise ValueError(
                f"method.real_stream: no effect on {self.real_source}; set method.real_source to shards, or leave it "
                "out"
            )
        if stage.trajectory.cache is not None and not self.samples_teacher:
            raise ValueError("trajectory.cache: no term uses the teacher's trajectories; leave it out")
        self._check_first_step(stage)
        if self.renoise.dyna_rs is not None:
            self.renoise.dyna_rs.resolve(steps)
        for settings, _ in active.values():
            settings.check(stage, self)
        rank = stage.models.fake_score_rank
        if self.fake_score_ema_to_student and stage.models.lora_per_step:
            raise ValueError(
                "method.fake_score_ema_to_student needs one adapter of the student: leave out models.lora_per_step"
            )
        if self.fake_score_ema_to_student and stage.models.train == "lora" and rank not in (None, stage.models.rank):
            raise ValueError(
                "method.fake_score_ema_to_student needs adapters of one rank: leave models.fake_score_rank out"
            )
        self._check_groups(stage.train.batch_size, trained)
        idle = first_gap([weight for _, weight in trained.values()], steps)
        if idle is not None:
            raise ValueError(f"method.terms: no term has a weight at step {idle}, after the student's training began")
        for name, (_, weight) in active.items():
            if "fake_score" in loss_terms.get(name).trainable_names:
                start, first = self.fake_score_start_step(steps), first_step(weight, steps)
                if start > first:
                    raise ValueError(
                        f"method.fake_score_start: the fake score starts at step {start}, after {name} at step {first}"
                    )

    def _check_first_step(self, stage: Stage) -> None:
        if self.first_step_weight == 1:
            return
        if max(map(len, stage.student.trained_levels)) == 1:
            raise ValueError("method.first_step_weight: no effect on a student of 1 step; leave it out")
        if self.first_step_weight == 0 and self.gradient_steps == "last":
            raise ValueError(
                "method.first_step_weight: at 0 nothing trains the first step; set method.gradient_steps to all"
            )

    def _check_groups(self, batch_size: int, trained: Mapping[str, object]) -> None:
        if batch_size % self.group_size:
            raise ValueError(f"train.batch_size {batch_size} is not a multiple of method.group_size {self.group_size}")
        terms = {name: loss_terms.get(name) for name in trained}
        real = [name for name, term in terms.items() if term.requires_real and term.student_uses_real]
        if self.group_size > 1 and real:
            raise ValueError(f"method.group_size: {real[0]} needs a real latent of each sample's own; set it to 1")


def first_step(weight: Schedule, steps: int) -> int:
    """The first step with a positive weight; ``steps`` if there is none."""
    return next((step for step in weight.breakpoints if step < steps and weight(step) > 0), steps)


def first_gap(weights: list[Schedule], steps: int) -> int | None:
    """The first step after the student's start at which all weights are 0."""
    start = min(first_step(weight, steps) for weight in weights)
    # between breakpoints a weight stays 0, or positive
    changes = sorted({step for weight in weights for step in weight.breakpoints if start <= step < steps})
    return next((step for step in changes if not any(weight(step) > 0 for weight in weights)), None)


@cache
def dmd_config_model() -> type[DMDConfig]:
    """``DMDConfig`` with a field for each registered term."""
    importlib.import_module("fewstep.methods.dmd.terms")  # registers the bundled terms
    fields: dict[str, Any] = {}
    for name in loss_terms.names():
        term: type[LossTerm] = loss_terms.get(name)
        summary = (sys.modules[term.__module__].__doc__ or "").split("\n")[0]
        fields[name] = (term.Settings | None, Field(None, description=summary))
    terms = create_model("TermsSection", __base__=TermsSection, __module__=__name__, **fields)
    described = Field(description=DMDConfig.model_fields["terms"].description)
    return create_model("DMDConfig", __base__=DMDConfig, __module__=__name__, terms=(terms, described))
