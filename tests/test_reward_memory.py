"""The planned memory of decoding and scoring, beside the real one."""

import pytest
import torch
from memory import peak_bytes

from fewstep.models.components import resolve_model
from fewstep.models.meta_pipeline import meta_pipeline
from fewstep.models.pipeline import load
from fewstep.plan.estimate import BUNDLED_CONFIGS
from fewstep.plan.reward_memory import reward_memory
from fewstep.rewards.combine import WeightedRewards
from fewstep.rewards.decode import decode_images
from fewstep.rewards.open import open_reward

PROMPT = "a noto emoji of a cat face on a red background"


@pytest.mark.parametrize(("batch_size", "micro_batch"), [(1, 1), (4, 2)])
def test_planned_memory_is_the_real_one_without_convolutions_scratch(batch_size: int, micro_batch: int) -> None:
    """On the CPU convolutions copy their inputs, outputs and gradients into layouts of their own, which no plan sees;
    as much again for each of the two or three that are alive."""
    planned = reward_memory(
        meta_pipeline(resolve_model("micro"), torch.float32),
        [open_reward("emoji", "meta")],
        batch_size,
        micro_batch=micro_batch,
        device_type="cpu",
    )
    pipeline = load("micro", "cpu", torch.float32)
    latents = torch.randn(batch_size, *pipeline.latent_shape(64, 64)).requires_grad_()
    combined = WeightedRewards({"emoji": (open_reward("emoji"), 1.0)}, micro_batch)

    def work() -> None:
        combined(decode_images(pipeline, latents, micro_batch), [PROMPT] * batch_size).sum().backward()

    activations = planned["decoded images"] + planned["decoding and scoring activations"]
    assert activations < peak_bytes(work) < 3.5 * activations


def test_memory_of_z_image_at_1024_pixels_is_bounded_by_the_micro_batch() -> None:
    pipeline = meta_pipeline(BUNDLED_CONFIGS["Tongyi-MAI/Z-Image-Turbo"], torch.bfloat16)
    pipeline.set_resolution(1024)
    one, four = (reward_memory(pipeline, [open_reward("emoji", "meta")], count) for count in (1, 4))
    images = 3 * 3 * 1024 * 1024 * 4
    assert sum(four.values()) < sum(one.values()) + 6 * images
    assert sum(one.values()) < 24 * 2**30
