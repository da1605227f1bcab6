"""What a loss term is: a class with a weight, what it needs, its metrics and its trainable parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field
from torch import Tensor, nn

from fewstep.config.base import Settings
from fewstep.config.schedule import Weight
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.method import BatchSource, Trainable
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.renoise import Renoise
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.training.distributed import DistContext

if TYPE_CHECKING:
    from fewstep.config.recipe import Stage
    from fewstep.methods.base import DataSetup
    from fewstep.methods.dmd.config import DMDConfig


class TermSettings(Settings):
    """Base of the terms' sections."""

    weight: Weight = Field(1.0, validate_default=True, description="Weight: a number, or a schedule over steps.")

    def check(self, stage: Stage, method: DMDConfig) -> None:
        """Refuse what does not fit the rest of the recipe. Raises: ValueError."""

    def further_prompts(self) -> Sequence[str]:
        """Prompts that the term trains on besides the recipe's. Raises: UserError if they cannot be read."""
        return ()


@dataclass(frozen=True)
class StudentSample:
    """A student sample and where it comes from.

    Attributes:
        x0: [B, C, ..., H, W], the student's data prediction, with gradient.
        z: [B, C, ..., H, W], its input, from backward simulation.
        sigma, anchor: [B], the noise level of z, after and before the shift.
        prompts: B of them.
        direction: [B, C, ..., H, W], the weighted sum of all directions at x0, without gradient; None where no term
            has one.
    """

    x0: Tensor
    z: Tensor
    sigma: Tensor
    anchor: Tensor
    prompts: EncodedPrompts
    direction: Tensor | None = None


#: The two noise levels of a renoise schedule.
Level = Literal["ca", "dm"]


class Renoised(NamedTuple):
    """The student's samples, noised: x [B, C, ..., H, W] at sigma [B]."""

    x: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class Direction:
    """A term's direction for the student's samples.

    Attributes:
        delta: [B, C, ..., H, W], normalized per sample.
        raw: [B, C, ..., H, W], before normalization, for metrics.
    """

    delta: Tensor
    raw: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TermSetup:
    """What terms are built from.

    Attributes:
        student: the trained denoiser. extra: further trained copies by name, such as "fake_score".
        copies: frozen copies of the student as it is when the training begins, by name.
        null: the encoded empty prompt, a batch of one.
        sigmas: the student's noise levels from 1 down, with the terminal 0.
        trained_sigmas: likewise for each number of steps that it is trained for.
        count_passes: only denoiser passes are counted, nothing else need be computed.
        sources: the method's batch sources. sample: batch -> fresh student samples x0, without gradient.
        endpoint: batch -> samples x0 at the end of the student's whole rollout, with gradient through its last step.
    """

    config: DMDConfig
    teacher: TextToImagePipeline
    student: nn.Module
    extra: Mapping[str, nn.Module]
    copies: Mapping[str, nn.Module]
    null: EncodedPrompts
    renoise: Renoise
    sigmas: Sequence[float]
    trained_sigmas: Sequence[Sequence[float]]
    batch_size: int
    total_steps: int
    sources: Mapping[str, BatchSource]
    dist: DistContext
    sample: Callable[[DistillBatch], Tensor]
    endpoint: Callable[[DistillBatch], Tensor]
    count_passes: bool = False


class LossTerm(ABC):
    """One term of the student's objective. Register it with ``@loss_terms.register("name")``.

    Attributes:
        Settings: its section in the recipe.
        requires_real: batches must bring real latents, or the teacher's trajectories.
        student_uses_real: where it requires real latents, the student's loss does, and not its trainables' alone.
        measures_real: real latents are measured once when the term is built.
        uses_sample: it needs a student sample at an anchor.
        learns_reward: its reward is a discriminator, which it trains.
        trainable_names, model_names: what ``trainables`` gives, and which further copies of the teacher it trains.
    """

    Settings: ClassVar[type[TermSettings]] = TermSettings
    requires_real: ClassVar[bool] = False
    measures_real: ClassVar[bool] = False
    student_uses_real: ClassVar[bool] = True
    uses_sample: bool = True
    learns_reward: ClassVar[bool] = False
    trainable_names: ClassVar[tuple[str, ...]] = ()
    model_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def build(cls, settings: TermSettings, setup: TermSetup) -> Self: ...

    @classmethod
    def metric_names(cls, settings: TermSettings) -> set[str] | None:
        """Every metric that it may give, as ``<part>/<name>``; None if they are not known beforehand."""
        return None

    @classmethod
    def batch_sources(cls, settings: TermSettings, setup: DataSetup) -> dict[str, BatchSource]:
        """Sources of its own by name, which ``build`` finds in ``TermSetup.sources``; made before the models are."""
        return {}

    @classmethod
    def student_copies(cls, settings: TermSettings) -> tuple[str, ...]:
        """Names of the frozen copies of the student, as it is when the training begins, that it needs."""
        return ()

    def trainables(self) -> list[Trainable]:
        """Its own trainable parts, with their losses."""
        return []

    def frozen_bytes(self) -> dict[str, float]:
        """Bytes of frozen weights that it needs on the device beside the models, by component; for ``plan``."""
        return {}

    def metrics(self) -> dict[str, Tensor]:
        """Further metrics of its last loss, by name."""
        return {}

    def before_step(self, step: int) -> None:  # noqa: B027  # optional
        """Called before each step of the trainer; ``step`` counts finished steps."""

    def after_step(self, step: int) -> None:  # noqa: B027  # optional
        """Called after each step of the trainer; ``step`` counts finished steps."""

    def state_dict(self) -> dict[str, Tensor]:
        """State besides the weights of its trainables, for checkpoints; the same on every process."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027  # optional
        """Restores what :meth:`state_dict` gave."""


class DirectionTerm(LossTerm):
    """A term that moves the student's samples along a direction, through one shared pseudo-target loss.

    Attributes:
        level: at which of the renoise schedule's two noise levels it is computed: sigma_CA or sigma_DM.
        teacher_prompts: the teacher's predictions it needs there, with the prompt ("cond") or the null prompt; those of
            all terms are computed in one batched forward.
    """

    level: ClassVar[Level]
    teacher_prompts: tuple[Literal["cond", "null"], ...] = ()

    @abstractmethod
    def direction(
        self, x0: Tensor, anchor: Tensor, prompts: EncodedPrompts, renoised: Renoised, teacher: Sequence[Tensor]
    ) -> Direction:
        """The direction at samples ``x0`` [B, C, ..., H, W] with anchors [B], without gradient.

        Args:
            renoised: the samples at this term's noise level.
            teacher: the teacher's data predictions for ``teacher_prompts``.
        """


class RegularizerTerm(LossTerm):
    """A term that is a loss of the student's samples, or of its whole rollout."""

    @abstractmethod
    def loss(self, sample: StudentSample | None, batch: DistillBatch) -> Tensor:
        """A scalar with gradient to the student alone; ``sample`` is None where no active term uses samples."""


class WeightingTerm(LossTerm):
    """A term that has no loss of its own, but multiplies the directions of other terms, sample by sample.

    Attributes:
        applies_to: the terms whose directions it multiplies; empty is all.
    """

    applies_to: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def sample_weights(self, share: float, sample: StudentSample, batch: DistillBatch) -> Tensor | None:
        """A weight for each sample [B], without gradient; None is 1 for all.

        Args:
            share: the term's own weight at this step.
        """


class RolloutTerm(LossTerm):
    """A term that makes samples of its own, once a step, and takes one or several updates on them.

    Attributes:
        updates: of the student on what was collected, in each step.
    """

    uses_sample = False
    updates: int = 1

    @abstractmethod
    def collect(self, batch: DistillBatch) -> Any:
        """Rollouts, scores and log-probabilities, without gradient. Called once a step and batch."""

    @abstractmethod
    def loss(self, collected: Any) -> Tensor:
        """A scalar with gradient to the student alone, of what :meth:`collect` returned."""


@dataclass(frozen=True)
class Collected:
    """A batch of the student's, and what each rollout term collected on it."""

    batch: DistillBatch
    rollouts: Mapping[str, Any]
