"""What every method provides: its config section, batch sources, trainable parts, state and dry run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fewstep.config.method import MethodConfig
from fewstep.config.recipe import DistillRecipe
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.method import BatchSource, Method, Trainable
from fewstep.data.batch import DistillBatch
from fewstep.data.prompt_stream import TrainingPrompts
from fewstep.methods.models_setup import Models
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.training.alerts import AlertRule
from fewstep.training.distributed import DistContext


@dataclass(frozen=True)
class DataSetup:
    """What a method's batch sources are made from.

    Attributes:
        teacher: whole, not yet sharded, without adapters.
        prompts: the recipe's training prompts.
        cache: folder for the teacher's trajectories.
    """

    recipe: DistillRecipe
    teacher: TextToImagePipeline
    prompts: TrainingPrompts
    cache: Path


@dataclass(frozen=True)
class MethodSetup:
    """What a method is built from.

    Attributes:
        null: the encoded empty prompt, a batch of one.
        sources: what ``batch_sources`` returned.
        count_passes: for ``plan``, which then counts denoiser passes alone: nothing else need be computed.
    """

    recipe: DistillRecipe
    models: Models
    null: EncodedPrompts
    sources: Mapping[str, BatchSource]
    prompts: TrainingPrompts
    dist: DistContext
    count_passes: bool = False


class DistillMethod(Method):
    """A method that ``fewstep distill`` can run. Register one with ``@methods.register("name")`` in a file of its own.

    Attributes:
        alert_rules: metrics that mean trouble; ``train.on_alert`` decides what happens.
    """

    alert_rules: ClassVar[Sequence[AlertRule]] = ()

    @classmethod
    @abstractmethod
    def config_model(cls) -> type[MethodConfig]:
        """The pydantic model of the recipe's ``method`` section, with ``name: Literal[...]``."""

    @classmethod
    @abstractmethod
    def batch_sources(cls, setup: DataSetup) -> dict[str, BatchSource]:
        """Sources by name; "train" is the trainer's. Called before the models are built, with the teacher whole."""

    @classmethod
    @abstractmethod
    def build(cls, setup: MethodSetup) -> Self:
        """The method on its models. No file is read or written here; for ``fewstep plan`` all tensors are meta."""

    def frozen_bytes(self) -> dict[str, float]:
        """Bytes of frozen weights on the device in a step, besides the models, by component; for ``fewstep plan``."""
        return {}

    def dry_run(self, batch: DistillBatch) -> Iterator[tuple[Trainable, Callable[[], Tensor]]]:
        """Each loss that ``fewstep plan`` runs on the meta device, with the part that it trains."""
        for trainable in self.trainables:
            yield trainable, self._loss_of(trainable, batch)

    def _loss_of(self, trainable: Trainable, batch: DistillBatch) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            given: Any = batch
            if trainable.uses_collected:
                with torch.no_grad():
                    given = self.collect(batch)
            return trainable.loss(given)[0]

        return loss
