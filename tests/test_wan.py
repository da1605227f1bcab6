"""Wan 2.1 passes the tests of every family, on images and on videos; its schedulers, prompts and configuration."""

import json
import shutil

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from family_conformance import FamilyConformance, load_tiny
from wan_setup import save_wan

from fewstep.config.load import load_recipe
from fewstep.errors import UserError
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.plan.estimate import plan
from fewstep.rewards.decode import decode_images

#: That of Wan-AI/Wan2.1-T2V-1.3B-Diffusers.
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_wan(tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture(scope="module")
def pipeline_class():
    return WanPipeline


class TestWan(FamilyConformance):
    """One frame."""

    def diffusers_velocity(self, pipeline, x, sigma, prompts):
        features, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
        return pipeline.transformer(x, 1000 * sigma, features, return_dict=False)[0]

    def diffusers_images(self, pipeline, **options):
        frames = pipeline(output_type="pt", num_frames=self.frames, **options).frames
        return frames[:, 0] if self.frames == 1 else frames


class TestWanVideos(TestWan):
    frames = 5


@pytest.fixture
def released(folder, tmp_path):
    """A folder with the scheduler of the released models."""
    copied = tmp_path / "released"
    shutil.copytree(folder, copied)
    pipeline = WanPipeline.from_pretrained(copied)
    pipeline.register_modules(scheduler=UniPCMultistepScheduler(**UNIPC))
    pipeline.save_pretrained(copied)
    return copied


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_videos_are_encoded_as_by_diffusers_and_an_image_is_one_of_one_frame(folder):
    model, vae = load_tiny(folder), WanPipeline.from_pretrained(folder).vae
    videos = torch.rand(2, 3, 9, 32, 48)
    mean, deviation = (torch.tensor(vae.config[name]).view(1, 4, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    expected = (vae.encode(videos * 2 - 1).latent_dist.mode() - mean) / deviation
    latents = model.encode_images(videos)
    assert latents.shape == (2, *model.latent_shape(32, 48, 9)) == (2, 4, 3, 4, 6)
    torch.testing.assert_close(latents, expected)
    assert model.decode(latents).shape == videos.shape
    torch.testing.assert_close(model.encode_images(videos[:, :, 0]), latents[:, :, :1])


@pytest.mark.parametrize("frames", [2, 4, 6, 80])
def test_other_numbers_of_frames_are_refused_and_the_nearest_are_named(folder, frames):
    fewer = (frames - 1) // 4 * 4 + 1
    wanted = f"frames {frames} is not one more than a multiple of 4; {fewer} and {fewer + 4} are"
    with pytest.raises(UserError, match=wanted):
        generate(load_tiny(folder), ["a fox"], SamplingParams(height=32, width=32, frames=frames))


def test_the_defaults_are_those_of_the_released_models(released):
    model = load_tiny(released)
    config = model.generation_config
    assert (config.steps, config.guidance_scale, config.size) == (50, 4.0, (480, 832, 81))
    assert model.shift == 3.0
    assert model.latent_shape(*config.size) == (4, 21, 60, 104)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_the_levels_of_the_released_scheduler_are_diffusers(released, steps):
    scheduler = UniPCMultistepScheduler.from_pretrained(released / "scheduler")
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(torch.tensor(load_tiny(released).sigmas(steps)), scheduler.sigmas, atol=2e-6, rtol=0)


def test_saving_keeps_the_scheduler_and_a_student_has_its_own(released, tmp_path):
    model = load_tiny(released)
    model.save(tmp_path / "again")
    assert type(WanPipeline.from_pretrained(tmp_path / "again").scheduler) is UniPCMultistepScheduler
    student = model.with_transformer(model.transformer, model.generation_config, student=True)
    assert type(student.scheduler) is FlowMapEulerDiscreteScheduler
    assert student.shift == 3.0
    student.scheduler.set_timesteps(4)
    assert student.sigmas(4) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert student.scheduler.sigmas.tolist() == pytest.approx(student.sigmas(4))


def test_prompts_are_cleaned_and_have_no_other_parts(folder):
    encoder = load_tiny(folder).encoder
    assert encoder.template(" a  fox &amp;\n a hen ") == "a fox & a hen"
    assert encoder([""]).lengths.tolist() == [1]  # </s>
    for part in ({"system": "Draw."}, {"assistant_prefix": "It is red."}):
        with pytest.raises(UserError, match="have no such part"):
            encoder(["a fox"], **part)
    with pytest.raises(UserError, match="at most 512 fit"):
        encoder(["a" * 512])


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"expand_timesteps": True}, "expand_timesteps true is not supported; only Wan 2.1 is"),
        ("model_index.json", {"boundary_ratio": 0.875}, "boundary_ratio 0.875 is not supported; only Wan 2.1 is"),
        ("vae/config.json", {"patch_size": 2}, "it has patches of pixels"),
        ("vae/config.json", {"latents_mean": [0.0]}, "latents_mean has 1 numbers; its latents have 4 channels"),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": False}, "use_flow_sigmas false is not supported"),
        ("scheduler/scheduler_config.json", {"flow_shift": 0}, "flow_shift 0 is not a positive number"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "_class_name DDIMScheduler is not"),
    ],
)
def test_other_versions_and_schedulers_are_refused(released, file, values, message):
    change(released / file, **values)
    with pytest.raises(UserError, match=message):
        load_tiny(released)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch_size": [2, 2, 2]}, "patch_size [2, 2, 2] is not supported"),
        ({"image_dim": 8}, "only text-to-video is supported"),
        ({"text_dim": 8}, "its hidden states have 16 features, the transformer takes 8"),
        ({"in_channels": 36}, "its latents have 4 channels, the transformer takes 36"),
    ],
)
def test_other_transformers_are_refused(folder, values, message):
    model = load_tiny(folder)
    model.transformer.register_to_config(**values)
    found = [problem for _, problem in model.family.mismatches(model.components)]
    assert len(found) == 1
    assert message in found[0]


def test_images_are_decoded_for_rewards_with_gradient(folder):
    """The autoencoder has no checkpointing of its own."""
    model = load_tiny(folder)
    latents = torch.randn(2, *model.latent_shape(32, 32), requires_grad=True)
    images = decode_images(model, latents)
    assert images.shape == (2, 3, 32, 32)
    # both decode in fp32, in different batches: on a CPU without AVX-512 their sums differ by rounding
    torch.testing.assert_close(images, model.decode(latents.detach()), rtol=1e-4, atol=1e-4)
    images.sum().backward()
    assert (latents.grad.abs().amax(dim=(1, 2, 3, 4)) > 0).all()


def test_rewards_of_videos_are_refused(folder):
    changes = [f"teacher={folder}", "frames=5", "resolution=32"]
    with pytest.raises(UserError, match=r"frames 5: method.terms.reward.rewards takes images alone; set frames to 1"):
        plan(load_recipe("micro-dmdr", [*changes, "init=null"]))
