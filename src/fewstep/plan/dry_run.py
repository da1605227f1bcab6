"""A method on torch's meta device: its models, losses, previews and forwards, and the memory that they take."""

from __future__ import annotations

from pathlib import Path

import torch

from fewstep.config.recipe import DistillRecipe
from fewstep.core.method import BatchSource, Shard
from fewstep.core.registry import methods
from fewstep.data.batch import DistillBatch
from fewstep.data.preference_batches import PairBatch
from fewstep.methods.base import DistillMethod, MethodSetup
from fewstep.methods.models_setup import Models, build_models
from fewstep.models.denoiser import TransformerDenoiser
from fewstep.models.meta_pipeline import meta_pipeline
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.plan.costs import decoding_bytes, forward_flops, loss_bytes, meta_noise, meta_prompts, sampling_bytes
from fewstep.plan.memory_tracker import DeviceType, EmulatedDevice
from fewstep.plan.passes import Passes, count_passes
from fewstep.training.distributed import DistContext


def meta_teacher(recipe: DistillRecipe, folder: Path) -> TextToImagePipeline:
    """The recipe's teacher on the meta device, from the configuration files of a folder; it has no tokenizer."""
    teacher = meta_pipeline(folder, torch.float32 if recipe.models.frozen_dtype == "fp32" else torch.bfloat16)
    teacher.set_size(recipe.resolution, recipe.frames)
    return teacher


def meta_models(recipe: DistillRecipe, teacher: TextToImagePipeline) -> Models:
    """The models of a distillation on the meta device; :class:`DryRun` applies gradient checkpointing."""
    plain = recipe.models.model_copy(update={"compile": False, "gradient_checkpointing": False, "context_parallel": 1})
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        changed = recipe.model_copy(update={"init": None, "models": plain})
        method = recipe.method
        return build_models(changed, teacher, method.extra_models(), copies=method.student_copies())


class DryRun:
    """Runs the losses of a recipe's method once each, with their backward passes, on the meta device.

    Args:
        models: on the meta device.
        batch_size: of one process.
        bf16: whether the training runs under autocast.
    """

    def __init__(
        self, recipe: DistillRecipe, models: Models, batch_size: int, device_type: DeviceType, bf16: bool
    ) -> None:
        self.models, self.batch_size, teacher = models, batch_size, models.teacher
        self.device, self.decoding = EmulatedDevice(device_type, bf16), EmulatedDevice(device_type, bf16=False)
        trained = [teacher.denoiser] if models.shares_base else [models.student.denoiser, *models.extra.values()]
        for denoiser in trained:
            assert isinstance(denoiser, TransformerDenoiser)
            for block in denoiser.get_blocks():  # also where a block is recomputed in a backward pass
                block.contexts.append(lambda _: self.device.autocast_region())
            if recipe.models.gradient_checkpointing:
                denoiser.enable_gradient_checkpointing()
        noise = meta_noise(teacher, batch_size)
        states = noise[:, None].expand(-1, recipe.student.trajectory_steps, *noise.shape[1:])
        self.batch = DistillBatch(noise, meta_prompts(teacher, batch_size), states, [""] * batch_size)

        def source(position: int, shard: Shard) -> DistillBatch:
            return self.batch

        quiet = recipe.model_copy(update={"train": recipe.train.model_copy(update={"on_alert": "off"})})
        method_class: type[DistillMethod] = methods.get(recipe.method.name)

        def pairs(position: int, shard: Shard) -> PairBatch:
            return PairBatch(noise, noise, self.batch.prompts)

        sources: dict[str, BatchSource] = {"train": source, "real": source, "preferences": pairs}
        null, dist = meta_prompts(teacher, 1), DistContext(device=torch.device("meta"))
        setup = MethodSetup(quiet, models, null, sources, [], dist)
        self.method = method_class.build(setup)
        self.passes: Passes = count_passes(method_class, setup, self.batch)

    def step(self) -> dict[str, float]:
        """Bytes beyond weights and optimizer states, for the loss that needs most: saved activations, temporaries."""
        found = [loss_bytes(self.device, part.module, loss) for part, loss in self.method.dry_run(self.batch)]
        worst = max(found, key=lambda rows: sum(rows.values()))
        return {name: size for name, size in worst.items() if size}

    def preview(self) -> dict[str, float]:
        """Bytes for sampling a batch of previews, or for decoding it, whichever is more."""
        sampling = sampling_bytes(self.models.teacher, self.models.student.denoiser, self.device)
        return max(sampling, self._decoding(), key=lambda rows: sum(rows.values()))

    def trajectories(self) -> dict[str, float]:
        """Bytes for sampling a batch of the guided teacher, as in the training's precision."""
        return sampling_bytes(self.models.teacher, self.models.teacher.denoiser, self.device, copies=2)

    def evaluation(self, dtype: torch.dtype) -> dict[str, float]:
        """Bytes for sampling a batch of the guided teacher in ``dtype``, or for decoding it, whichever is more."""
        teacher = self.models.teacher
        larger = dtype.itemsize / teacher.transformer.dtype.itemsize
        found = sampling_bytes(teacher, teacher.denoiser, self.decoding, copies=2)
        sampling = {name: larger * size for name, size in found.items()}
        return max(sampling, self._decoding(), key=lambda rows: sum(rows.values()))

    def _decoding(self) -> dict[str, float]:
        return decoding_bytes(self.models.teacher, self.decoding)

    def flops(self) -> float:
        """Floating point operations of one forward on a batch."""
        return forward_flops(self.models.teacher, self.models.teacher.denoiser, self.device, self.batch_size)
