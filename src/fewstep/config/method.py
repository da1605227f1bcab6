"""The `method` section of a recipe: one of the registered methods."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from fewstep.config.base import Settings
from fewstep.core.method import UPDATE_METRICS
from fewstep.core.registry import load_plugins, methods

if TYPE_CHECKING:
    from fewstep.config.recipe import Stage


VALIDATION = "val/"  # how the names of validation metrics begin


class MethodConfig(Settings):
    """Base of the methods' sections; ``name`` selects the method. Subclasses give it as a Literal."""

    name: str

    def trainable_parts(self) -> list[str]:
        """Names of the parts that are trained: the keys of ``optim``."""
        return ["student"]

    def extra_models(self) -> list[str]:
        """Names of trainable copies of the teacher beside the student, such as the fake score."""
        return []

    def student_copies(self) -> list[str]:
        """Names of frozen copies of the student, as it is when the training begins."""
        return []

    def trained_rewards(self) -> dict[str, float] | None:
        """The rewards that are trained on, as "name" or "name:argument", with their weights: none where the reward is
        a discriminator that is trained as well. None: no reward is trained on.
        """
        return None

    def check_files(self) -> None:
        """Find what is wrong with files and models that the method needs besides the recipe's own, before any is
        loaded.

        Raises:
            UserError: one is missing, or does not fit.
        """

    def further_prompts(self) -> dict[str, Sequence[str]]:
        """Prompts that are trained on besides the recipe's, by the key that names them.

        Raises:
            UserError: they cannot be read.
        """
        return {}

    @property
    def samples_teacher(self) -> bool:
        """Whether it trains on the teacher's trajectories, which are sampled before the training."""
        return False

    @property
    def streams_real(self) -> bool:
        """Whether it trains on a stream of real samples with prompts of their own."""
        return False

    def metric_names(self, stage: Stage) -> set[str] | None:
        """Every metric that the losses may give, as ``<part>/<name>``; None if they are not known beforehand."""
        return None

    def check_metric(self, metric: str, stage: Stage) -> None:
        """Raises: ValueError if this is no metric of the training; those of validation are checked elsewhere."""
        known = self.metric_names(stage)
        if known is not None and not metric.startswith(VALIDATION):
            known |= {f"{part}/{name}" for part in self.trainable_parts() for name in UPDATE_METRICS}
            if metric not in known:
                raise ValueError(
                    f"train.keep_best.metric: there is no {metric!r}; there are {', '.join(sorted(known))}, and "
                    f"{VALIDATION}* of the scorers"
                )

    def check(self, stage: Stage) -> None:
        """Refuse what does not fit the rest of the recipe.

        Raises:
            ValueError: one line that names the key.
        """


def method_union() -> Any:
    """The type of the `method` section: a discriminated union of all registered methods."""
    load_plugins()
    members = [methods.get(name).config_model() for name in methods.names()]
    return Annotated[
        reduce(or_, members),
        Field(discriminator="name", description=f"The method: {', '.join(methods.names())}."),
    ]
