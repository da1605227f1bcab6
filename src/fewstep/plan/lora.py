"""The plan of a LoRA training, before any weight is loaded: see ``estimate.py``.

The text encoder and the autoencoder compute before the transformer is on the device, and leave it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.config.lora_recipe import LoraRecipe
from fewstep.core.method import Trainable
from fewstep.core.registry import lora_methods
from fewstep.data.batch import DistillBatch
from fewstep.methods.lora.base import LoraMethod, LoraModels, LoraSetup
from fewstep.methods.lora.models_setup import LoraFiles, build_lora_models, frozen_dtype
from fewstep.models.adapters import is_adapter_key
from fewstep.models.components import resolve_model
from fewstep.models.denoiser import TransformerDenoiser
from fewstep.models.meta_pipeline import meta_pipeline
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.models.vision_language import MAX_TOKENS
from fewstep.plan import costs
from fewstep.plan.estimate import BUNDLED_CONFIGS, ENCODING, PREVIEW, STEP, Plan
from fewstep.plan.memory_tracker import DeviceType, EmulatedDevice, MemoryTracker
from fewstep.plan.passes import CountingDenoiser, Passes, average_passes

IMAGES = "encoding images"

#: Settings that save memory, in the order in which they are suggested.
LORA_MEMORY_OPTIONS = (
    "models.gradient_checkpointing=true",
    "models.frozen_dtype=bf16",
    "models.frozen_dtype=fp8",
    "models.frozen_dtype=nf4",
    "models.offload_blocks=true",
)


def plan_lora(recipe: LoraRecipe, device_type: DeviceType = "cuda") -> Plan:
    """The plan of a LoRA's training on images of the largest of ``data.resolutions``, or of the model's own size.

    Args:
        device_type: whose kernels and autocast are emulated.

    Raises:
        UserError: there is no such model or LoRA file, or it cannot be read.
    """
    model = _meta(recipe, recipe.model)
    model.set_size(None if recipe.data.resolutions is None else max(recipe.data.resolutions), frames=1)
    config, base = model.generation_config, model.denoiser
    parameters = costs.count_parameters(model.transformer)
    bf16 = recipe.train.precision != "fp32" if device_type == "cuda" else recipe.train.precision == "bf16"
    device, plain = EmulatedDevice(device_type, bf16), EmulatedDevice(device_type, bf16=False)
    models = _meta_models(recipe, model)
    denoisers = [base] if models.teacher is None else [base, models.teacher.denoiser]
    for denoiser in denoisers:
        for block in denoiser.get_blocks():  # also where a block is recomputed in a backward pass
            block.contexts.append(lambda _: device.autocast_region())
        if recipe.models.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()

    size = recipe.train.batch_size
    noise = costs.meta_noise(model, size)
    privileged = None if recipe.method.image_encoder is None else costs.meta_prompts(model, size, MAX_TOKENS)
    batch = DistillBatch(noise, costs.meta_prompts(model, size), noise[:, None], [""] * size, privileged)
    method_class: type[LoraMethod] = lora_methods.get(recipe.method.name)
    setup = LoraSetup(recipe, models, costs.meta_prompts(model, 1))
    with torch.random.fork_rng(devices=[]):  # the losses draw noise
        method = method_class.build(setup)
        losses = [costs.loss_bytes(device, part.module, _loss(part, batch)) for part in method.trainables]
        flops = costs.forward_flops(model, base, device, size)
        passes = _passes(method_class, setup, batch)
    held = _weights(denoisers, method.trainables, recipe.models.offload_blocks)
    held |= costs.state_bytes(recipe.optim, {part.name: _trained(part.module) for part in method.trainables})
    worst = max(losses, key=lambda rows: sum(rows.values()))
    guided = config.guidance_scale > 0 if recipe.preview.guidance_scale is None else recipe.preview.guidance_scale > 0
    sampling = costs.sampling_bytes(model, model.denoiser, device, copies=1 + guided)
    preview = max(sampling, costs.decoding_bytes(model, plain), key=lambda rows: sum(rows.values()))
    peaks = {
        ENCODING: costs.encoding_bytes(model),
        IMAGES: _image_encoding(model, plain),
        STEP: held | {name: size for name, size in worst.items() if size},
        PREVIEW: held | preview,
    }
    recomputed = passes.backwards if recipe.models.gradient_checkpointing else 0
    # the frozen weights need no gradients: a backward pass is one product for each of the forward's, not two
    batches = passes.forward_batches + passes.backwards + recomputed
    total = flops * batches * recipe.train.gradient_accumulation_steps
    return Plan(parameters, config.height, config.width, peaks, passes.forwards, passes.backwards, total)


def _folder(name: str) -> Path:
    return BUNDLED_CONFIGS.get(name) or resolve_model(name)


def _meta(recipe: LoraRecipe, name: str) -> TextToImagePipeline:
    model = meta_pipeline(_folder(name), frozen_dtype(recipe.models))
    if name in BUNDLED_CONFIGS and name.endswith("-Turbo"):  # the bundled files are the base's
        turbo = {"steps": 8, "guidance_scale": 0.0}
        model.generation_config = model.generation_config.model_copy(update=turbo)
    return model


def _meta_models(recipe: LoraRecipe, model: TextToImagePipeline) -> LoraModels:
    """On the meta device, not compiled, checkpointed or offloaded."""
    off = {"compile": False, "gradient_checkpointing": False, "offload_blocks": False}
    plain = recipe.models.model_copy(update=off)
    name = recipe.method.teacher_model
    files = LoraFiles.read(recipe, _folder(recipe.model), None if name is None else _folder(name))
    teacher = None if name is None else _meta(recipe, name)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        changed = recipe.model_copy(update={"models": plain})
        return build_lora_models(changed, model, torch.device("meta"), teacher, files)


def _loss(part: Trainable, batch: DistillBatch) -> Callable[[], Tensor]:
    return lambda: part.loss(batch)[0]


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _weights(denoisers: list[TransformerDenoiser], trainables: list[Trainable], offloaded: bool) -> dict[str, float]:
    """Bytes of the frozen weights, with a LoRA that is added while training, and of the adapters; of offloaded blocks
    only the largest counts."""
    adapters = {f"{costs.label(part.name)} adapter": 4.0 * _trained(part.module) for part in trainables}
    frozen = sum(map(costs.bytes_of, denoisers)) - sum(adapters.values())
    if offloaded:
        blocks = [_frozen_bytes(block) for denoiser in denoisers for block in denoiser.get_blocks()]
        frozen += max(blocks) - sum(blocks)
    return {"frozen weights": frozen} | adapters


def _frozen_bytes(block: nn.Module) -> int:
    """Of a block's weights and buffers, without LoRA adapters."""
    adapters = sum(parameter.nbytes for key, parameter in block.named_parameters() if is_adapter_key(key))
    return int(costs.bytes_of(block)) - adapters


@torch.no_grad()
def _image_encoding(model: TextToImagePipeline, device: EmulatedDevice) -> dict[str, float]:
    """Bytes for encoding one image."""
    config = model.generation_config
    with MemoryTracker() as encoding, device.autocast_region():
        image = torch.empty(1, 3, config.height, config.width, device="meta", dtype=model.vae.dtype)
        model.family.encode_images(model.vae, image)
    return {"VAE": costs.bytes_of(model.vae), "encoding activations": float(encoding.peak)}


def _passes(method_class: type[LoraMethod], setup: LoraSetup, batch: DistillBatch) -> Passes:
    """The mean passes of one step in which all parts are trained."""
    passes, models = Passes(), setup.models

    def stand_in() -> CountingDenoiser:
        return CountingDenoiser(passes, len(batch), 1, trained=True)

    others = {name: stand_in() for name in models.teacher_denoisers}
    changed = replace(models, denoiser=stand_in(), teacher_denoisers=others)  # type: ignore[arg-type]
    return average_passes(method_class.build(replace(setup, models=changed)), batch, passes)
