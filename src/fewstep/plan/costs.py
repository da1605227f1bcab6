"""Memory and arithmetic of parts of a run on torch's meta device: losses, sampling, decoding, forwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fewstep.config.sections import OptimSettings
from fewstep.core.batching import max_batch_size, max_decode_batch_size
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import Denoiser
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.models.text import MAX_TOKENS_PER_BATCH
from fewstep.plan.memory_tracker import EmulatedDevice, MemoryTracker

PROMPT_TOKENS = 64  # a prompt of about 40 words, with the chat template


def bytes_of(module: nn.Module) -> float:
    """Bytes of parameters and buffers, such as the scales of fp8 weights."""
    return float(sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()]))


def count_parameters(module: nn.Module) -> int:
    """Numbers in all its parameters."""
    return sum(p.numel() for p in module.parameters())


def meta_noise(model: TextToImagePipeline, count: int) -> Tensor:
    """Noise of ``count`` images, or videos, of the model's default size, without contents."""
    config = model.generation_config
    return torch.empty(count, *model.latent_shape(*config.size), device="meta")


def meta_prompts(model: TextToImagePipeline, count: int, tokens: int | None = None) -> EncodedPrompts:
    """``count`` encoded prompts of so many tokens, without contents; of ``PROMPT_TOKENS``, or as many as the family's
    have, where the number is not given."""
    width = model.family.prompt_features(model.components)
    tokens = tokens or model.family.prompt_tokens or PROMPT_TOKENS
    return EncodedPrompts(torch.empty(count, tokens, width, device="meta"), torch.full((count,), tokens))


def loss_bytes(device: EmulatedDevice, module: nn.Module, loss: Callable[[], Tensor]) -> dict[str, float]:
    """Bytes of one loss and its backward pass, beyond weights, gradients and optimizer states.

    Args:
        module: what the loss trains.
    """
    weights = [p for p in module.parameters() if p.requires_grad]
    for weight in weights:  # gradients are counted elsewhere; an accumulating backward pass allocates more
        weight.grad = torch.empty_like(weight)
    with MemoryTracker() as tracker:
        with device.autocast_region():
            value = loss()
            saved, copies, peak = tracker.bytes, device.copy_bytes, tracker.peak
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


@torch.no_grad()
def decoding_bytes(model: TextToImagePipeline, device: EmulatedDevice) -> dict[str, float]:
    """Bytes for decoding a batch of images."""
    config = model.generation_config
    count = min(max_batch_size(*config.size), max_decode_batch_size(*config.size))
    with MemoryTracker() as decoding, device.autocast_region():
        model.family.decode_latents(model.vae, meta_noise(model, count))
    return {"VAE": bytes_of(model.vae), "decoding activations": float(decoding.peak)}


@torch.no_grad()
def sampling_bytes(
    model: TextToImagePipeline, denoiser: Denoiser, device: EmulatedDevice, copies: int = 1
) -> dict[str, float]:
    """Bytes of a forward on a batch; with guidance a forward takes two copies of it."""
    config = model.generation_config
    count = copies * max_batch_size(*config.size)
    with MemoryTracker() as sampling, device.autocast_region():
        denoiser(meta_noise(model, count), torch.empty(count, device="meta"), meta_prompts(model, count))
    return {"sampling activations": float(sampling.peak)}


def encoding_bytes(model: TextToImagePipeline) -> dict[str, float]:
    """Bytes of the text encoders, and of the hidden states of all their layers for one batch of tokens."""
    names = [name for name in model.family.prompt_components if name in model.family.modules]
    numbers = 0
    for encoder in (model.components[name] for name in names):
        numbers += encoder.config.hidden_size * (encoder.config.num_hidden_layers + 1) * encoder.dtype.itemsize
    activations = float(MAX_TOKENS_PER_BATCH * numbers)
    return {"text encoder": bytes_of(model.encoder.text_encoder), "text-encoder activations": activations}


@torch.no_grad()
def forward_flops(model: TextToImagePipeline, denoiser: Denoiser, device: EmulatedDevice, batch_size: int) -> float:
    """Floating point operations of one forward on a batch."""
    with FlopCounterMode(display=False) as counter, device.autocast_region():
        sigma = torch.empty(batch_size, device="meta")
        denoiser(meta_noise(model, batch_size), sigma, meta_prompts(model, batch_size))
    return float(counter.get_total_flops())


def state_bytes(optim: dict[str, OptimSettings], counts: dict[str, int]) -> dict[str, float]:
    """Bytes of gradients (of one trainable at a time), optimizer states and EMA, by trainable part."""
    return {
        "gradients": 4.0 * max(counts.values()),
        **{f"{label(name)} optimizer": count * _moments(optim[name]) for name, count in counts.items()},
        **{f"{label(name)} EMA": 4.0 * count for name, count in counts.items() if optim[name].ema_decay is not None},
    }


def label(part: str) -> str:
    """A trainable part's name in a table."""
    return part.replace("_", " ")


def _moments(optim: OptimSettings) -> float:
    """Bytes of the optimizer state for each parameter: AdamW's two moments, in 8 bits with an fp32 scale for every 256
    numbers; Muon's momentum, as if every parameter were a matrix of a block."""
    return {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256), "muon": 4.0}[optim.optimizer]
