"""A method on torch's meta device: its models, losses, previews and forwards, and the memory that they take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fewstep.config.recipe import DistillRecipe
from fewstep.core.batching import max_batch_size, max_decode_batch_size
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import Denoiser
from fewstep.core.method import BatchSource, Shard
from fewstep.core.registry import methods
from fewstep.data.batch import DistillBatch
from fewstep.data.preference_batches import PairBatch
from fewstep.methods.base import DistillMethod, MethodSetup
from fewstep.methods.models_setup import Models, build_models
from fewstep.models.denoiser import TransformerDenoiser
from fewstep.models.meta_pipeline import meta_pipeline
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.plan.memory_tracker import DeviceType, EmulatedDevice, MemoryTracker
from fewstep.plan.passes import Passes, count_passes
from fewstep.training.distributed import DistContext

PROMPT_TOKENS = 64  # a prompt of about 40 words, with the chat template


def meta_teacher(recipe: DistillRecipe, folder: Path) -> TextToImagePipeline:
    """The recipe's teacher on the meta device, from the configuration files of a folder; it has no tokenizer."""
    teacher = meta_pipeline(folder, torch.float32 if recipe.models.frozen_dtype == "fp32" else torch.bfloat16)
    teacher.set_resolution(recipe.resolution)
    return teacher


def meta_models(recipe: DistillRecipe, teacher: TextToImagePipeline) -> Models:
    """The models of a distillation on the meta device; :class:`DryRun` applies gradient checkpointing."""
    plain = recipe.models.model_copy(update={"compile": False, "gradient_checkpointing": False})
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        changed = recipe.model_copy(update={"init": None, "models": plain})
        method = recipe.method
        return build_models(changed, teacher, method.extra_models(), copies=method.student_copies())


def bytes_of(module: nn.Module) -> float:
    """Bytes of parameters and buffers, such as the scales of fp8 weights."""
    return float(sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()]))


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
        self.latent = teacher.latent_shape(teacher.generation_config.height, teacher.generation_config.width)
        noise = self.noise(batch_size)
        states = noise[:, None].expand(-1, recipe.student.steps, *noise.shape[1:])
        self.batch = DistillBatch(noise, self.prompts(batch_size), states, [""] * batch_size)

        def source(position: int, shard: Shard) -> DistillBatch:
            return self.batch

        quiet = recipe.model_copy(update={"train": recipe.train.model_copy(update={"on_alert": "off"})})
        method_class: type[DistillMethod] = methods.get(recipe.method.name)

        def pairs(position: int, shard: Shard) -> PairBatch:
            return PairBatch(noise, noise, self.batch.prompts)

        sources: dict[str, BatchSource] = {"train": source, "real": source, "preferences": pairs}
        setup = MethodSetup(quiet, models, self.prompts(1), sources, [], DistContext(device=torch.device("meta")))
        self.method = method_class.build(setup)
        self.passes: Passes = count_passes(method_class, setup, self.batch)

    def noise(self, count: int) -> Tensor:
        return torch.empty(count, *self.latent, device="meta")

    def prompts(self, count: int) -> EncodedPrompts:
        width = self.models.teacher.family.prompt_features(self.models.teacher.components)
        features = torch.empty(count, PROMPT_TOKENS, width, device="meta")
        return EncodedPrompts(features, torch.full((count,), PROMPT_TOKENS))

    def step(self) -> dict[str, float]:
        """Bytes beyond weights and optimizer states, for the loss that needs most: saved activations, temporaries."""
        found = [self.update(part.module, loss) for part, loss in self.method.dry_run(self.batch)]
        worst = max(found, key=lambda rows: sum(rows.values()))
        return {name: size for name, size in worst.items() if size}

    def update(self, module: nn.Module, loss: Callable[[], Tensor]) -> dict[str, float]:
        """Bytes of one loss and its backward pass."""
        weights = [p for p in module.parameters() if p.requires_grad]
        for weight in weights:  # gradients are counted elsewhere; an accumulating backward pass allocates more
            weight.grad = torch.empty_like(weight)
        with MemoryTracker() as tracker:
            with self.device.autocast_region():
                value = loss()
                saved, copies, peak = tracker.bytes, self.device.copy_bytes, tracker.peak
            tracker.reset_peak()
            if value.requires_grad:  # no term may have a weight yet
                value.backward()
            peak = max(peak, tracker.peak)
        for weight in weights:
            weight.grad = None
        return {
            "bf16 copies": float(copies),
            "saved activations": float(saved - copies),
            "temporaries": float(peak - saved),
        }

    def preview(self) -> dict[str, float]:
        """Bytes for sampling a batch of previews, or for decoding it, whichever is more."""
        sampling = self._sampling(self.models.student.denoiser, self.device)
        return max(sampling, self._decoding(), key=lambda rows: sum(rows.values()))

    def trajectories(self) -> dict[str, float]:
        """Bytes for sampling a batch of the guided teacher, as in the training's precision."""
        return self._sampling(self.models.teacher.denoiser, self.device, copies=2)

    def evaluation(self, dtype: torch.dtype) -> dict[str, float]:
        """Bytes for sampling a batch of the guided teacher in ``dtype``, or for decoding it, whichever is more."""
        teacher = self.models.teacher
        larger = dtype.itemsize / teacher.transformer.dtype.itemsize
        found = self._sampling(teacher.denoiser, self.decoding, copies=2)
        sampling = {name: larger * size for name, size in found.items()}
        return max(sampling, self._decoding(), key=lambda rows: sum(rows.values()))

    @torch.no_grad()
    def _decoding(self) -> dict[str, float]:
        """Bytes for decoding a batch of images."""
        teacher = self.models.teacher
        config = teacher.generation_config
        count = min(max_batch_size(config.height, config.width), max_decode_batch_size(config.height, config.width))
        with MemoryTracker() as decoding, self.decoding.autocast_region():
            teacher.family.decode_latents(teacher.vae, self.noise(count))
        return {"VAE": bytes_of(teacher.vae), "decoding activations": float(decoding.peak)}

    @torch.no_grad()
    def _sampling(self, denoiser: Denoiser, device: EmulatedDevice, copies: int = 1) -> dict[str, float]:
        """Bytes of a forward on a batch; with guidance a forward takes two copies of it."""
        config = self.models.teacher.generation_config
        count = copies * max_batch_size(config.height, config.width)
        with MemoryTracker() as sampling, device.autocast_region():
            denoiser(self.noise(count), torch.empty(count, device="meta"), self.prompts(count))
        return {"sampling activations": float(sampling.peak)}

    @torch.no_grad()
    def flops(self) -> float:
        """Floating point operations of one forward on a batch."""
        with FlopCounterMode(display=False) as counter, self.device.autocast_region():
            sigma = torch.empty(self.batch_size, device="meta")
            self.models.teacher.denoiser(self.noise(self.batch_size), sigma, self.prompts(self.batch_size))
        return float(counter.get_total_flops())
