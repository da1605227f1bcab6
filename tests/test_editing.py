"""Image to image and inpainting: against diffusers' pipelines, and what a mask keeps."""

import numpy as np
import pytest
import torch
from diffusers import ZImageImg2ImgPipeline
from PIL import Image

from fewstep.core.flow import add_noise
from fewstep.errors import UserError
from fewstep.inference.editing import SourceImages, encode_source, first_step
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.noise import initial_noise
from fewstep.models.pipeline import load

PROMPTS = ["a fox", "a bear " * 20]


def source_of(tiny, mask=None):
    return SourceImages(torch.randn(2, *tiny.latent_shape(64, 64)), mask)


def last_latents(model, source, **options):
    steps = []
    generate(model, PROMPTS, SamplingParams(**options), steps.append, source)
    return steps[-1].sampler_step.x_next, steps


def half_mask():
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., 4:] = 1
    return mask


@pytest.mark.parametrize(
    ("steps", "strength", "left"), [(4, 1.0, 4), (4, 0.75, 3), (8, 0.3, 3), (4, 0.5, 2), (8, 0.99, 8)]
)
def test_strength_picks_the_first_of_the_models_own_levels(tiny, steps, strength, left):
    assert steps - first_step(steps, strength) == left
    _, made = last_latents(tiny, source_of(tiny), steps=steps, strength=strength)
    assert [step.sampler_step.sigma for step in made] == tiny.sigmas(steps)[steps - left : -1]
    assert [(step.step, step.steps) for step in made] == [(index + 1, left) for index in range(left)]


def test_a_strength_without_any_step_is_refused():
    with pytest.raises(UserError, match="none of the 4 steps is left"):
        first_step(4, 1e-17)
    assert first_step(4, 0.1) == 3


def test_latents_equal_diffusers_image_to_image(tiny_folder):
    model = load(tiny_folder)
    pipeline = ZImageImg2ImgPipeline.from_pretrained(tiny_folder)
    pipeline.set_progress_bar_config(disable=True)
    source, noise = source_of(model), initial_noise(model, [3, 4], 64, 64)
    start = add_noise(source.latents, model.sigmas(5)[first_step(5, 0.6)], noise)
    theirs = pipeline(
        list(PROMPTS), image=[Image.new("RGB", (64, 64))] * 2, height=64, width=64, latents=start.clone(), strength=0.6,
        sigmas=np.linspace(1, 0, 6)[:-1].tolist(), num_inference_steps=5, guidance_scale=0.0, output_type="latent",
    ).images  # fmt: skip
    ours, _ = last_latents(model, source, steps=5, strength=0.6, guidance_scale=0.0, seed=3)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", ["euler", "sde"])
def test_a_mask_keeps_the_image_where_it_is_zero(tiny, sampler):
    source = source_of(tiny, half_mask())
    latents, made = last_latents(tiny, source, steps=4, strength=0.75, sampler=sampler)
    assert torch.equal(latents[..., :4], source.latents[..., :4])
    assert (latents[..., 4:] - source.latents[..., 4:]).abs().mean() > 0.1
    noise = initial_noise(tiny, [0, 1], 64, 64)
    for step in made:
        kept = add_noise(source.latents, step.sampler_step.sigma_next, noise)
        assert torch.equal(step.sampler_step.x_next[..., :4], kept[..., :4])
    everywhere = SourceImages(source.latents, torch.ones(2, 1, 8, 8))
    without, _ = last_latents(tiny, SourceImages(source.latents), steps=4, strength=0.75, sampler=sampler)
    assert torch.equal(last_latents(tiny, everywhere, steps=4, strength=0.75, sampler=sampler)[0], without)


def test_strength_one_forgets_the_image_without_a_mask(tiny):
    with_source, _ = last_latents(tiny, source_of(tiny), steps=3, strength=1.0)
    steps = []
    generate(tiny, PROMPTS, SamplingParams(steps=3), steps.append)
    assert torch.equal(with_source, steps[-1].sampler_step.x_next)


def test_images_are_encoded_and_a_mask_covers_every_touched_latent_pixel(tiny):
    images, masks = torch.rand(2, 3, 64, 64), torch.zeros(2, 1, 64, 64)
    masks[0, 0, 9, 17] = 1
    source = encode_source(tiny, images, masks)
    torch.testing.assert_close(source.latents, tiny.encode_images(images), atol=1e-4, rtol=1e-4)
    assert source.mask.nonzero().tolist() == [[0, 0, 1, 2]]
    with pytest.raises(UserError, match="height 60 is not a multiple of 16"):
        encode_source(tiny, images[:, :, :60])
