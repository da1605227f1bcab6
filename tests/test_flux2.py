"""FLUX.2 [klein] passes the tests of every family; its noise levels, prompts, latents and configuration."""

import json

import pytest
import torch
from diffusers import Flux2KleinPipeline
from family_conformance import FamilyConformance, load_tiny, quiet
from flux2_setup import save_flux2
from language_models import random_model

from fewstep.errors import UserError
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.flux2.schedule import dynamic_shift


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_flux2(tmp_path_factory.mktemp("models") / "flux2")


@pytest.fixture(scope="module")
def pipeline_class():
    return Flux2KleinPipeline


class TestFlux2(FamilyConformance):
    def diffusers_velocity(self, pipeline, x, sigma, prompts):
        features, text = pipeline.encode_prompt(prompts)
        image = pipeline._prepare_latent_ids(x)
        found = pipeline.transformer(
            pipeline._pack_latents(x), features, sigma, image, text, None, return_dict=False
        )[0]  # fmt: skip
        return torch.stack([one.T.reshape(x.shape[1:]) for one in found])


@pytest.mark.parametrize(("steps", "side"), [(4, 64), (50, 64), (8, 1152)])
def test_the_noise_levels_are_those_of_diffusers(folder, steps, side):
    """Of 16 tokens, and of 5,184, where the number of steps does not matter."""
    pipeline, levels = Flux2KleinPipeline.from_pretrained(folder), []

    def note(pipe, step, timestep, tensors):
        levels.append(pipe.scheduler.sigmas)
        pipe._interrupt = True
        return tensors

    latents = torch.zeros(1, 16, side // 16, side // 16)
    quiet(pipeline)(prompt="a", height=side, width=side, num_inference_steps=steps, guidance_scale=1, latents=latents,
                    output_type="latent", callback_on_step_end=note)  # fmt: skip
    torch.testing.assert_close(torch.tensor(load_tiny(folder).sigmas(steps, (side, side))), levels[0])


def test_a_student_s_levels_do_not_depend_on_the_size(folder):
    model = load_tiny(folder)
    student = model.with_transformer(model.transformer, model.generation_config, student=True)
    assert student.shift == model.shift == pytest.approx(dynamic_shift(4096, 50))
    assert student.sigmas(4, (64, 64)) == student.sigmas(4, (128, 128))
    assert model.sigmas(4, (64, 64)) != model.sigmas(4, (128, 128))


def test_images_of_other_sizes_have_levels_of_their_own(folder):
    theirs = Flux2KleinPipeline.from_pretrained(folder)
    ours = load_tiny(folder)
    params = SamplingParams(seed=1, steps=2, guidance_scale=0, height=96, width=64)
    image = generate(ours, ["a fox"], params).images[0].float()
    expected = quiet(theirs)(
        prompt="a fox", height=96, width=64, num_inference_steps=2, guidance_scale=1, output_type="pt",
        generator=torch.Generator().manual_seed(1),
    ).images[0]  # fmt: skip
    assert (image - (expected.permute(1, 2, 0) * 255).round()).abs().max() <= 2


def test_latents_are_encoded_as_in_diffusers(folder):
    images = torch.rand(2, 3, 64, 96)
    expected = Flux2KleinPipeline.from_pretrained(folder)._encode_vae_image(images * 2 - 1, None)
    torch.testing.assert_close(load_tiny(folder).encode_images(images), expected, atol=1e-5, rtol=1e-4)


def test_prompts_have_512_tokens_and_no_further_parts(folder):
    encoder = load_tiny(folder).encoder
    assert encoder(["a fox", ""]).lengths.tolist() == [512, 512]
    with pytest.raises(UserError, match="system_prompt: prompts of Flux2KleinPipeline have no such part"):
        encoder(["a fox"], system="Draw.")
    with pytest.raises(UserError, match="at most 512 fit"):
        encoder(["fox " * 600])


def test_the_distilled_model_is_known_by_its_index_and_stays_distilled(folder, tmp_path):
    base = load_tiny(folder).generation_config
    assert (base.steps, base.guidance_scale, base.guidance_distilled) == (50, 3.0, False)
    model = load_tiny(save_flux2(tmp_path / "distilled", is_distilled=True))
    config = model.generation_config
    assert (config.steps, config.guidance_scale, config.guidance_distilled) == (4, 0.0, True)
    saved = model.save(tmp_path / "saved")
    assert json.loads((saved / "model_index.json").read_text())["is_distilled"] is True
    assert Flux2KleinPipeline.from_pretrained(saved).config.is_distilled


def test_another_time_shift_is_refused(tmp_path):
    folder = save_flux2(tmp_path / "linear", time_shift_type="linear")
    with pytest.raises(UserError, match="time_shift_type 'linear' is not supported; only exponential is"):
        load_tiny(folder)


def test_components_that_do_not_fit_are_refused(folder):
    model = load_tiny(folder)

    def problems(**changes):
        return dict(model.family.mismatches({**model.components, **changes}))

    assert not problems()
    assert problems(text_encoder=random_model()) == {"text_encoder": "it has 3 layers; prompts are encoded by layer 27"}
    wide = random_model(num_hidden_layers=27, hidden_size=48)
    assert problems(text_encoder=wide)["text_encoder"] == "3 hidden states have 144 features, the transformer takes 96"
    model.transformer.register_to_config(in_channels=64)
    assert problems()["vae"] == "a token of its latents has 16 channels, the transformer takes 64"
