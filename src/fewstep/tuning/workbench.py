"""What the trials of a search share: the teacher, encoded prompts, cached trajectories, and how they are measured."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fewstep.config.recipe import DistillRecipe
from fewstep.evaluation.feature_networks import FeatureNetwork
from fewstep.evaluation.teacher_distance import TeacherDistance
from fewstep.evaluation.validation import Validator
from fewstep.jobs import Inputs, make_trainer, open_inputs
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.stages import free_memory
from fewstep.training.distributed import DistContext
from fewstep.training.run_dir import RunDir
from fewstep.training.trainer import Trainer
from fewstep.tuning.budget import Clock
from fewstep.tuning.turns import one_at_a_time


class Workbench:
    """Makes the trainers of a search's trials.

    Args:
        folder: of the search, for caches.
        clock: of the search; it stops while shared things are made.
        validation: the validation prompts that every trial is measured on.
        network: measures the distance to the teacher; None where the objective is another metric.
    """

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        validation: Sequence[str],
        network: FeatureNetwork | None,
        dist: DistContext,
    ) -> None:
        self.folder, self.clock, self.validation = folder, clock, list(validation)
        self.network, self.dist = network, dist
        self._inputs: Inputs | None = None
        self._opened_for: tuple[object, ...] = ()
        self._distances: dict[tuple[int | None, int | None], TeacherDistance] = {}
        self._prepared: set[tuple[object, ...]] = set()

    def trainer(self, recipe: DistillRecipe, run: RunDir) -> Trainer:
        """A trial's trainer; it validates where a call of ``fit`` ends."""
        shared = self._cache(recipe), *_teacher_key(recipe)
        if shared in self._prepared:
            return self._trainer(recipe, run)
        with self.clock.stopped(), one_at_a_time(self.folder / "shared"):
            made = self._trainer(recipe, run)
        self._prepared.add(shared)
        return made

    def _trainer(self, recipe: DistillRecipe, run: RunDir) -> Trainer:
        inputs = self._inputs_of(recipe)
        validator = Validator(self.validation, recipe.evaluate.scorers, further=self._further(recipe, inputs))
        own = replace(inputs, teacher=sharing_weights(inputs.teacher))
        trainer, _ = make_trainer(recipe, run, own, validator, self.dist, self._cache(recipe))
        return trainer

    def _inputs_of(self, recipe: DistillRecipe) -> Inputs:
        """The teacher and the prompts; those of the last trial where it had the same."""
        if self._inputs is None or self._opened_for != _teacher_key(recipe):
            self._inputs = None
            free_memory()
            self._inputs = open_inputs(recipe, self.dist, self.folder / "encoded-prompts")
            self._opened_for = _teacher_key(recipe)
        return self._inputs

    def _further(self, recipe: DistillRecipe, inputs: Inputs) -> Callable[..., Mapping[str, float]] | None:
        if self.network is None:
            return None
        size = recipe.resolution, recipe.frames
        if size not in self._distances:
            name = "-".join(str(each) for each in ("teacher", recipe.resolution or "own", recipe.frames) if each)
            file = self.folder / f"{name}.safetensors"
            self._distances[size] = TeacherDistance(inputs.teacher, self.validation, self.network, file=file)
        return self._distances[size]

    def _cache(self, recipe: DistillRecipe) -> Path:
        """The folder of the teacher's trajectories, which trials with equal ones share."""
        made_from = recipe.trajectory.model_dump(mode="json"), recipe.resolution, recipe.frames, recipe.student.levels
        text = json.dumps([*made_from, recipe.train.precision])
        return self.folder / "cache" / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _teacher_key(recipe: DistillRecipe) -> tuple[object, ...]:
    """What of the searched keys the loaded teacher depends on."""
    return recipe.resolution, recipe.frames, recipe.models.frozen_dtype == "fp32"


def sharing_weights(model: TextToImagePipeline) -> TextToImagePipeline:
    """A pipeline on the same weights, whose modules are its own: adapters, quantization and compilation change these,
    and leave the frozen weights."""
    transformer = model.transformer
    kept = [*transformer.parameters(), *transformer.buffers()]
    modules = copy.deepcopy(transformer, {id(tensor): tensor for tensor in kept})
    shared = model.with_transformer(modules, model.generation_config)
    shared.enable_model_cpu_offload()
    return shared
