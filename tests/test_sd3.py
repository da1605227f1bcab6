"""SD3 passes the tests of every family; its noise levels, prompts and configuration."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from family_conformance import FamilyConformance, load_tiny
from sd3_setup import clip_encoder, save_sd3

from fewstep.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_sd3(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture(scope="module")
def pipeline_class():
    return StableDiffusion3Pipeline


class TestSD3(FamilyConformance):
    evenly_spaced = False

    def diffusers_velocity(self, pipeline, x, sigma, prompts):
        features, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        return pipeline.transformer(x, features, pooled, sigma * 1000, return_dict=False)[0]


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_the_noise_levels_are_those_of_diffusers(folder, steps):
    scheduler = StableDiffusion3Pipeline.from_pretrained(folder).scheduler
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(torch.tensor(load_tiny(folder).sigmas(steps)), scheduler.sigmas)


def test_prompts_have_no_further_parts_and_a_limit(folder):
    encoder = load_tiny(folder).encoder
    assert encoder(["a fox", ""]).lengths.tolist() == [1 + 77 + 256] * 2
    with pytest.raises(UserError, match="system_prompt: prompts of StableDiffusion3Pipeline have no such part"):
        encoder(["a fox"], system="Draw.")
    with pytest.raises(UserError, match="assistant_prefix: prompts of StableDiffusion3Pipeline have no such part"):
        encoder(["a fox"], assistant_prefix="It is red.")
    with pytest.raises(UserError, match="at most 256 fit"):
        encoder(["a" * 256])


def test_positions_limit_the_sides(folder):
    with pytest.raises(UserError, match="128 x 144: this transformer has positions for sides of at most 128 pixels"):
        load_tiny(folder).latent_shape(144, 128)


def test_components_that_do_not_fit_are_refused(folder):
    model = load_tiny(folder)
    found = dict(model.family.mismatches({**model.components, "text_encoder_2": clip_encoder(24)}))
    assert found == {"text_encoder": "both CLIPs' pooled vectors have 32 features, the transformer takes 24"}
    found = dict(model.family.mismatches({**model.components, "text_encoder_2": clip_encoder(32)}))
    assert found["text_encoder_3"] == "its hidden states have 32 features, fewer than both CLIPs' 40"


def test_the_default_is_that_of_the_released_model(folder):
    config = load_tiny(folder).generation_config
    assert (config.steps, config.guidance_scale) == (40, 3.5)
