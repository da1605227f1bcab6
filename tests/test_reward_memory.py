"""The memory of decoding for a reward as ``fewstep plan`` counts it, beside the real one."""

import pytest
import torch
from memory import peak_bytes
from reward_setup import Linear

from fewstep.methods.rl.refl import output_gradient
from fewstep.models.components import resolve_model
from fewstep.models.meta_pipeline import meta_pipeline
from fewstep.models.pipeline import load
from fewstep.plan.estimate import BUNDLED_CONFIGS
from fewstep.plan.memory_tracker import EmulatedDevice, MemoryTracker
from fewstep.rewards.combine import WeightedRewards
from fewstep.rewards.decode import decode_images


def score_and_go_back(pipeline, device, batch_size, micro_batch):
    """Decoding with gradient, a reward that takes no memory, and the backward pass, as in the reward's term."""
    config = pipeline.generation_config
    shape = pipeline.latent_shape(config.height, config.width)
    latents = torch.randn(batch_size, *shape, device=device)
    rewards = WeightedRewards({"brightness": (Linear(), 1.0)}, micro_batch)
    return lambda: output_gradient(
        lambda x: rewards(decode_images(pipeline, x, micro_batch), [""] * batch_size).sum(), latents
    )


def planned_bytes(pipeline, batch_size, micro_batch, device_type):
    work = score_and_go_back(pipeline, "meta", batch_size, micro_batch)
    with MemoryTracker() as tracker, EmulatedDevice(device_type, bf16=False).autocast_region():
        work()
    return tracker.peak


@pytest.mark.parametrize(("batch_size", "micro_batch"), [(1, 1), (4, 2)])
def test_planned_memory_is_the_real_one_without_convolutions_scratch(batch_size: int, micro_batch: int) -> None:
    """On the CPU convolutions copy their inputs, outputs and gradients into layouts of their own, which no plan sees;
    as much again for each of the two or three that are alive."""
    planned = planned_bytes(meta_pipeline(resolve_model("micro"), torch.float32), batch_size, micro_batch, "cpu")
    work = score_and_go_back(load("micro", "cpu", torch.float32), "cpu", batch_size, micro_batch)
    assert planned < peak_bytes(work) < 3.5 * planned


def test_memory_of_z_image_at_1024_pixels_is_bounded_by_the_micro_batch() -> None:
    pipeline = meta_pipeline(BUNDLED_CONFIGS["Tongyi-MAI/Z-Image-Turbo"], torch.bfloat16)
    pipeline.set_size(1024)
    one, two = (planned_bytes(pipeline, count, 1, "cuda") for count in (1, 2))
    images = 3 * 3 * 1024 * 1024 * 4  # decoded, their gradient, and one more
    assert two < one + 2 * images
    assert one < 24 * 2**30
