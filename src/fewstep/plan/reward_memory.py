"""The memory of a reward's part of a step: decoding with gradient, and scoring, on the meta device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fewstep.models.pipeline import TextToImagePipeline
from fewstep.plan.dry_run import bytes_of
from fewstep.plan.memory_tracker import DeviceType, EmulatedDevice, MemoryTracker
from fewstep.rewards.combine import WeightedRewards
from fewstep.rewards.decode import decode_images
from fewstep.rewards.protocol import Reward


def reward_memory(
    pipeline: TextToImagePipeline,
    rewards: Sequence[Reward],
    batch_size: int,
    *,
    micro_batch: int = 1,
    device_type: DeviceType = "cuda",
) -> dict[str, float]:
    """Bytes that rewards add to a step, by component: decoding with gradient, scoring, and the backward pass.

    Args:
        pipeline: on the meta device; its resolution is that of the images.
        rewards: opened on the meta device. Of those without gradient only the weights are counted.
        batch_size: images of one process.
        micro_batch: images that are decoded, and scored, at a time.
        device_type: whose kernels are emulated.
    """
    config = pipeline.generation_config
    shape = pipeline.latent_shape(config.height, config.width)
    latents = torch.empty(batch_size, *shape, device="meta", requires_grad=True)
    combined = WeightedRewards({str(index): (each, 1.0) for index, each in enumerate(rewards)}, micro_batch)
    with MemoryTracker() as tracker, EmulatedDevice(device_type, bf16=False).autocast_region():
        images = decode_images(pipeline, latents, micro_batch)
        held = tracker.bytes
        scores = combined(images, ["a prompt of about as many words as people write for an image"] * batch_size)
        if scores.requires_grad:
            scores.sum().backward()
    return {
        "VAE": bytes_of(pipeline.vae),
        "reward weights": float(combined.info.parameters),
        "decoded images": float(held),
        "decoding and scoring activations": float(tracker.peak - held),
    }
