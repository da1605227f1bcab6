"""The memory of decoding and scoring as ``fewstep plan`` counts it, beside the real one."""

import pytest
import torch
from memory import peak_bytes

from fewstep.models.components import resolve_model
from fewstep.models.meta_pipeline import meta_pipeline
from fewstep.models.pipeline import load
from fewstep.plan.estimate import BUNDLED_CONFIGS
from fewstep.plan.memory_tracker import EmulatedDevice, MemoryTracker
from fewstep.rewards.combine import WeightedRewards
from fewstep.rewards.decode import decode_images
from fewstep.rewards.open import open_reward

PROMPT = "a noto emoji of a cat face on a red background"


def score_and_go_back(pipeline, device, batch_size, micro_batch):
    """Decoding with gradient, scoring, and the backward pass."""
    config = pipeline.generation_config
    shape = pipeline.latent_shape(config.height, config.width)
    latents = torch.randn(batch_size, *shape, device=device).requires_grad_()
    combined = WeightedRewards({"emoji": (open_reward("emoji", device), 1.0)}, micro_batch)
    return lambda: combined(decode_images(pipeline, latents, micro_batch), [PROMPT] * batch_size).sum().backward()


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
    pipeline.set_resolution(1024)
    one, four = (planned_bytes(pipeline, count, 1, "cuda") for count in (1, 4))
    images = 3 * 3 * 1024 * 1024 * 4
    assert four < one + 6 * images
    assert one < 24 * 2**30
