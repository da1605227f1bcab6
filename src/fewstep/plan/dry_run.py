"""A distillation's models on torch's meta device, and the memory of its losses, previews and forwards there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3Model

from fewstep.config.recipe import DistillRecipe
from fewstep.core.conditioning import EncodedPrompts
from fewstep.inference.batching import max_batch_size, max_decode_batch_size
from fewstep.methods.models_setup import Models, build_models
from fewstep.models.adapters import capture_adapter_state
from fewstep.models.components import load_component, read_config
from fewstep.models.generation_config import load_generation_config
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.models.vae import decode_latents
from fewstep.models.zimage.denoiser import ZImageDenoiser
from fewstep.plan.memory_tracker import DeviceType, EmulatedDevice, MemoryTracker
from fewstep.plan.step_costs import StepCosts, step_costs

PROMPT_TOKENS = 64  # a prompt of about 40 words, with the chat template


def meta_teacher(recipe: DistillRecipe, folder: Path) -> TextToImagePipeline:
    """The recipe's teacher on the meta device, from the configuration files of a folder; it has no tokenizer."""
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel.from_config(read_config(folder, "transformer"))
        vae = AutoencoderKL.from_config(read_config(folder, "vae"))
        text_encoder = Qwen3Model(Qwen3Config(**read_config(folder, "text_encoder")))
    for module in (transformer, vae, text_encoder):
        # diffusers' own `to` warns about dtypes of real weights
        nn.Module.to(module, torch.float32 if recipe.roles.base == "fp32" else torch.bfloat16)
        module.eval().requires_grad_(False)
    scheduler = load_component(folder, "scheduler")
    teacher = TextToImagePipeline(transformer, vae, text_encoder, None, scheduler, load_generation_config(folder))
    teacher.set_resolution(recipe.size)
    return teacher


def meta_models(recipe: DistillRecipe, teacher: TextToImagePipeline) -> Models:
    """The models of a distillation on the meta device; :class:`DryRun` applies gradient checkpointing."""
    later = {"init": None, "compile": False, "gradient_checkpointing": False}
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build_models(recipe.model_copy(update=later), teacher)


def bytes_of(module: nn.Module) -> float:
    """Bytes of parameters and buffers, such as the scales of fp8 weights."""
    return float(sum(t.nbytes for t in [*module.parameters(), *module.buffers()]))


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
        trainable = [teacher.denoiser] if models.shared else [models.student.denoiser, models.fake]
        for denoiser in trainable:
            assert isinstance(denoiser, ZImageDenoiser)
            denoiser.run_block = self.device.wrap(denoiser.run_block)
            if recipe.gradient_checkpointing and models.shared:
                denoiser.enable_gradient_checkpointing(capture_adapter_state)
            elif recipe.gradient_checkpointing:
                denoiser.enable_gradient_checkpointing()
        self.latent = teacher.latent_shape(teacher.generation_config.height, teacher.generation_config.width)
        self.costs: StepCosts = step_costs(recipe, models, self.noise(batch_size), self.prompts(batch_size))

    def noise(self, count: int) -> Tensor:
        return torch.empty(count, *self.latent, device="meta")

    def prompts(self, count: int) -> EncodedPrompts:
        width = self.models.teacher.transformer.config["cap_feat_dim"]
        features = torch.empty(count, PROMPT_TOKENS, width, device="meta")
        return EncodedPrompts(features, torch.full((count,), PROMPT_TOKENS))

    def step(self) -> dict[str, float]:
        """Bytes beyond weights and optimizer states, for the loss that needs most: saved activations, temporaries."""
        found = [
            self.update(self.costs.modules[name], loss) for name, losses in self.costs.losses.items() for loss in losses
        ]
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
            value.backward()
            peak = max(peak, tracker.peak)
        for weight in weights:
            weight.grad = None
        return {
            "bf16 copies": float(copies),
            "saved activations": float(saved - copies),
            "temporaries": float(peak - saved),
        }

    @torch.no_grad()
    def preview(self) -> dict[str, float]:
        """Bytes for sampling a batch of previews, or for decoding it, whichever is more."""
        config, vae = self.models.teacher.generation_config, self.models.teacher.vae
        count = max_batch_size(config.height, config.width)
        decoded = min(count, max_decode_batch_size(config.height, config.width))
        with MemoryTracker() as sampling, self.device.autocast_region():
            self.models.student.denoiser(self.noise(count), torch.empty(count, device="meta"), self.prompts(count))
        with MemoryTracker() as decoding, self.decoding.autocast_region():
            decode_latents(vae, self.noise(decoded))
        rows = [
            {"sampling activations": float(sampling.peak)},
            {"VAE": bytes_of(vae), "decoding activations": float(decoding.peak)},
        ]
        return max(rows, key=lambda one: sum(one.values()))

    @torch.no_grad()
    def flops(self) -> float:
        """Floating point operations of one forward on a batch."""
        with FlopCounterMode(display=False) as counter, self.device.autocast_region():
            sigma = torch.empty(self.batch_size, device="meta")
            self.models.teacher.denoiser(self.noise(self.batch_size), sigma, self.prompts(self.batch_size))
        return float(counter.get_total_flops())
