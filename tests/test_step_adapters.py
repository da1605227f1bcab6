"""Students with a LoRA for each step: each sample's step computes with its own, files open in fewstep and diffusers."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from diffusers import ZImagePipeline
from dmd_setup import LEVELS, SHIFT
from gaussian import SHAPE, Gaussian, prompts_of
from safetensors.torch import load_file, save_file

from fewstep import api
from fewstep.config.load import load_recipe
from fewstep.core import flow
from fewstep.core.denoiser import predict_x0
from fewstep.data.batch import DistillBatch
from fewstep.errors import UserError
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.methods.dmd.student_sampler import StudentSampler
from fewstep.models.adapters import AdapterDenoiser, adapter_parameters, add_adapter
from fewstep.models.layer_cache import CacheSettings
from fewstep.models.pipeline import load
from fewstep.models.step_adapters import StepAdapterDenoiser, step_adapters
from fewstep.models.zimage.denoiser import ZImageDenoiser
from fewstep.models.zimage.family import ZIMAGE

NAMES = step_adapters("student", 3)
SIGMAS = [1.0, 0.8, 0.4]

SHORT = [
    *("train.batch_size=2", "train.log_every=1", "train.save_every=2", "train.sample_every=0", "train.precision=fp32"),
    *("method.terms={cfg_augmentation: {}, distribution_matching: {}}", "method.fake_score_start=0"),
    *("method.fake_score_updates=1", "evaluate.enabled=false", "student.steps=2", "models.train=lora"),
    "evaluate.validate_every=0",
    *("models.rank=2", "models.lora_alpha=4", "models.lora_per_step=true", "optim.student={lr: 0.05, ema_decay: 0.5}"),
]


@pytest.fixture
def stack(tiny):
    """A denoiser with three adapters that differ, and its base."""
    transformer = copy.deepcopy(tiny.transformer)
    for name in NAMES:
        add_adapter(transformer, name, 2, target_modules=ZIMAGE.lora_target_modules)
        for parameter in adapter_parameters(transformer, name).values():
            torch.nn.init.normal_(parameter, std=0.2)
    base = ZImageDenoiser(transformer)
    return StepAdapterDenoiser(base, NAMES, [*SIGMAS, 0.0]), base


@pytest.mark.parametrize("call", ["forward", "features"])
def test_each_sample_is_computed_with_the_adapter_of_its_step(tiny, stack, call):
    denoiser, base = stack
    x, prompts = torch.randn(4, 16, 8, 8), tiny.encode(["a dog", "a cat on a mat", "", "a red apple"])
    sigma = torch.tensor([0.4, 1.0, 0.75, 0.1])  # between levels the nearest one counts
    found = getattr(denoiser, call)(x, sigma, prompts)
    for row, name in enumerate(["student_3", "student_1", "student_2", "student_3"]):
        alone = getattr(AdapterDenoiser(base, {name: 1.0}), call)(x[[row]], sigma[[row]], prompts[[row]])
        torch.testing.assert_close(found[[row]], alone, atol=1e-4, rtol=1e-4)
    assert (found - getattr(base, call)(x, sigma, prompts)).abs().amax() > 0.01


def test_a_step_trains_its_own_adapter_alone(tiny, stack):
    denoiser, _ = stack
    assert len(list(denoiser.parameters())) == 3 * len(adapter_parameters(denoiser.base.transformer, "student_1"))
    x, prompts = torch.randn(2, 16, 8, 8), tiny.encode(["a dog", "a cat"])
    denoiser(x, torch.full((2,), 0.8), prompts).square().sum().backward()
    reached = {name.split("/")[-2] for name, p in denoiser.named_parameters() if p.grad is not None}
    assert reached == {"student_2"}


def test_steps_with_different_layers_share_no_cache(stack):
    denoiser, _ = stack
    with denoiser.reuse_layers(None), denoiser.cache_text_tokens():
        pass
    with pytest.raises(UserError, match=r"^cache taylor: this student has a LoRA for each step"):
        denoiser.reuse_layers(CacheSettings("taylor", 3))


def test_a_run_is_saved_reopened_continued_and_drawn_by_diffusers(tiny_folder, tmp_path):
    more = [f"teacher={tiny_folder}", *SHORT]
    made = api.distill("micro-aligned", tmp_path / "run", overrides=[*more, "train.steps=2"])
    made = api.distill("micro-aligned", tmp_path / "run", overrides=[*more, "train.steps=4"])
    files = [made.student / "step_loras" / step / "pytorch_lora_weights.safetensors" for step in ("1", "2")]
    first, second = map(load_file, files)
    assert any(not torch.equal(first[key], second[key]) for key in first)

    student = load(made.student)
    ours = generate(student, ["a dog"], SamplingParams(seed=5)).images[0]
    pipeline = ZImagePipeline.from_pretrained(made.student)  # diffusers alone, as the guide says
    pipeline.set_progress_bar_config(disable=True)
    for step in ("1", "2"):
        pipeline.load_lora_weights(made.student / "step_loras" / step, adapter_name=step)
    pipeline.set_adapters("1")

    def next_adapter(pipe, step, timestep, kwargs):
        if step + 2 <= 2:
            pipe.set_adapters(str(step + 2))
        return kwargs

    image = pipeline(
        "a dog", height=64, width=64, num_inference_steps=2, guidance_scale=0.0, callback_on_step_end=next_adapter,
        generator=torch.Generator("cpu").manual_seed(5), output_type="pt",
    ).images[0]  # fmt: skip
    theirs = (image.permute(1, 2, 0) * 255).round()
    assert (ours.float() - theirs).abs().max() <= 2
    student.denoiser = student.denoiser.base  # the base without adapters draws something else
    assert (generate(student, ["a dog"], SamplingParams(seed=5)).images[0].int() - ours.int()).abs().max() > 2

    # init starts every step from its own
    short = [*more, "train.steps=1", "optim.student={lr: 1.0e-12}", f"init={made.student}"]
    onward = api.distill("micro-aligned", tmp_path / "onward", overrides=short)
    for file in files:
        kept = load_file(onward.student / file.relative_to(made.student))
        torch.testing.assert_close(kept, load_file(file))
    with pytest.raises(UserError, match="has 2 LoRAs, one for each step; this recipe trains 3"):
        api.distill("micro-aligned", tmp_path / "other", overrides=[*short, "student.steps=3"])
    # what one transformer cannot hold is refused
    with pytest.raises(UserError, match=r"^teacher: .* is a student with a LoRA for each step"):
        api.distill("micro-aligned", tmp_path / "taught", overrides=[*short, f"teacher={made.student}"])

    # damaged files are named
    save_file({key: tensor[:1] for key, tensor in first.items()}, files[0])
    with pytest.raises(UserError, match=r"1/pytorch_lora_weights.safetensors: its layers or shapes are not those"):
        load(made.student)
    files[1].unlink()
    save_file(first, files[0])
    with pytest.raises(UserError, match=r"2/pytorch_lora_weights.safetensors cannot be read"):
        load(made.student)
    config = made.student / "fewstep.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sigmas": None}))
    with pytest.raises(UserError, match=r"fewstep.json: .*step_loras: sigmas is missing"):
        load(made.student)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["models.train=full", "models.rank=32", "models.lora_alpha=null"], "lora_per_step: no effect on full copies"),
        (["student.step_counts=[1, 2]"], "models.lora_per_step: the student's steps must be fixed"),
        (["method.fake_score_ema_to_student=0.1"], "needs one adapter of the student"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, reason):
    with pytest.raises(UserError, match=reason):
        load_recipe("micro-aligned", [*SHORT, *overrides])


# --- gradient through all steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "sde"])
def test_gradients_of_all_steps_are_those_of_the_whole_rollout(sampler):
    """Against a rollout without checkpointing; the last step's alone differ."""
    sigmas = flow.sigmas_from_timesteps(LEVELS, SHIFT)[:-1]
    prompts, noise = prompts_of([0.3, -0.2]), torch.randn(2, *SHAPE)
    batch = DistillBatch(noise=noise, prompts=prompts)

    def gradient(make):
        student = Gaussian(deviation=0.5)
        torch.manual_seed(3)
        x0 = make(student)
        (x0 - 1).square().mean().backward()
        return x0.detach(), student.offset.grad

    def plain(student):
        z = noise
        for sigma, following in pairwise(sigmas):
            velocity = student(z, torch.full((2,), sigma), prompts)
            x0 = flow.x0_from_velocity(z, sigma, velocity)
            eps = torch.randn_like(z) if sampler == "sde" else x0 + velocity
            z = flow.add_noise(x0, following, eps)
        return predict_x0(student, z, torch.full((2,), sigmas[-1]), prompts)

    def ours(steps):
        def make(student):
            drawn = StudentSampler(student, LEVELS, SHIFT, "fixed", sampler, 1.0, gradient_steps=steps)
            return drawn.endpoint(batch)

        return make

    value, expected = gradient(plain)
    for steps in ("all", "last"):
        found, reached = gradient(ours(steps))
        torch.testing.assert_close(found, value, atol=1e-5, rtol=1e-4)
        assert torch.allclose(reached, expected, atol=1e-6, rtol=1e-3) == (steps == "all")
