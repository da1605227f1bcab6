"""Generation against diffusers' own pipeline; batches, seeds, callbacks and cancellation."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline

from fewstep.core.batching import max_batch_size, max_decode_batch_size
from fewstep.core.guidance import ClassifierFreeGuidance
from fewstep.core.samplers import sample_euler
from fewstep.inference.generate import GenerationCancelled, generate
from fewstep.inference.params import SamplingParams
from fewstep.models.adapters import adapter_parameters, add_adapter
from fewstep.models.noise import initial_noise
from fewstep.models.pipeline import load

PROMPTS = ["a noto emoji of a red apple on a blue background", "蓝色背景上的红苹果，twemoji 风格", "a fox " * 12]


def images_of(pipeline, prompts=PROMPTS, **options):
    return generate(pipeline, prompts, SamplingParams(**options)).images


def difference(a, b):
    """Largest difference of a color value, of 255."""
    return (a.int() - b.int()).abs().max()


# --- against diffusers ------------------------------------------------------------------------------------------


def diffusers_images(folder, steps, guidance, seed, **options):
    pipeline = ZImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(PROMPTS))]
    made = pipeline(
        list(PROMPTS),
        height=64,
        width=64,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        **options,
    )
    return np.stack([np.array(image) for image in made.images])


@pytest.mark.parametrize(
    ("steps", "guidance", "options", "nfe"),
    [
        (4, 0.0, {}, 4),
        (8, 0.0, {}, 8),
        (5, 2.5, {}, 10),
        (5, 4.0, {"negative_prompt": "a blue dog"}, 10),
        (5, 4.0, {"cfg_normalization": 1.0}, 10),
        (5, 4.0, {"cfg_truncation": 0.3, "cfg_normalization": 0.9, "negative_prompt": "a dog"}, 8),
    ],
)
def test_images_equal_diffusers(tiny_folder, steps, guidance, options, nfe):
    params = SamplingParams(seed=7, steps=steps, guidance_scale=guidance, **options)
    ours = generate(load(tiny_folder), PROMPTS, params)
    per_prompt = {name: [value] * len(PROMPTS) if isinstance(value, str) else value for name, value in options.items()}
    theirs = diffusers_images(tiny_folder, steps, guidance, seed=7, **per_prompt)
    assert ours.images.shape == theirs.shape == (3, 64, 64, 3)
    assert theirs.std() > 1
    # only single pixels may be rounded differently
    distance = np.abs(ours.images.numpy().astype(int) - theirs.astype(int))
    assert distance.max() <= 1
    assert (distance > 0).mean() < 1e-3
    assert ours.nfe == nfe
    if options:
        plain = images_of(load(tiny_folder), seed=7, steps=steps, guidance_scale=guidance)
        assert difference(ours.images, plain) > 1


@pytest.mark.parametrize(("steps", "guidance", "shift"), [(8, 0.0, 3.0), (50, 4.0, 6.0)])
def test_latents_equal_diffusers(tiny_folder, tmp_path, steps, guidance, shift):
    """With the settings of Z-Image-Turbo, whose sigmas are explicit, and of Z-Image."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift": shift}))
    pipeline = ZImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    model, noise = load(folder), initial_noise(load(folder), [3, 4], 64, 64)
    sigmas = np.linspace(1, 0, steps + 1)[:-1].tolist()  # before the shift, which diffusers applies to them
    theirs = pipeline(
        list(PROMPTS[:2]), height=64, width=64, latents=noise.clone(), sigmas=sigmas, num_inference_steps=steps,
        guidance_scale=guidance, output_type="latent",
    ).images  # fmt: skip
    prompts, denoiser = model.encode(PROMPTS[:2]), model.denoiser
    if guidance:
        denoiser = ClassifierFreeGuidance(denoiser, model.encode([""]), guidance + 1)
    with torch.no_grad():
        ours = sample_euler(denoiser, noise, model.sigmas(steps), prompts)
    assert (theirs - noise).abs().mean() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5 * steps, rtol=1e-4)


# --- batches and seeds ------------------------------------------------------------------------------------------


def test_image_does_not_depend_on_its_batch(tiny):
    seeds = (1, 2, 3)
    together = images_of(tiny, seeds=seeds, steps=3)
    alone = [images_of(tiny, [p], seed=s, steps=3) for p, s in zip(PROMPTS, seeds, strict=True)]
    assert difference(together, torch.cat(alone)) <= 1
    whole = images_of(tiny, seeds=seeds, steps=3, sampler="sde")
    for size in (1, 2):
        assert difference(images_of(tiny, seeds=seeds, steps=3, batch_size=size, sampler="sde"), whole) <= 1
    assert difference(images_of(tiny, seeds=seeds, steps=3, sampler="sde", eta=0.0), together) <= 1
    assert difference(together, whole) > 1


@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("sampler", ["euler", "sde"])
def test_on_a_cpu_no_bit_depends_on_the_batch(tiny, sampler, guidance):
    """Latents and images, with prompts of several padded lengths; a plain batch differs, else there were no need."""
    prompts = [*PROMPTS, "a fox", "a bear on a red background"]
    options = {"steps": 3, "guidance_scale": guidance, "sampler": sampler}

    def drawn(prompts, seeds):
        last = []
        made = generate(tiny, prompts, SamplingParams(seeds=tuple(seeds), **options), last.append)
        return made.images, last[-1].sampler_step.x_next

    images, latents = drawn(prompts, range(5))
    for row, prompt in enumerate(prompts):
        image, latent = drawn([prompt], [row])
        assert torch.equal(image[0], images[row])
        assert torch.equal(latent[0], latents[row])
    some, _ = drawn(prompts[3:0:-1], [3, 2, 1])
    assert torch.equal(some, images[[3, 2, 1]])


def test_large_images_are_sampled_and_decoded_in_small_batches(tiny, monkeypatch):
    assert [max_batch_size(side, side) for side in (64, 128, 512, 1024, 4096)] == [64, 64, 8, 2, 1]
    assert [max_decode_batch_size(side, side) for side in (512, 1024, 4096)] == [4, 1, 1]
    expected, sampled, decoded = images_of(tiny, steps=2), [], []
    monkeypatch.setattr("fewstep.core.batching.MAX_PIXELS_PER_BATCH", 2 * 64 * 64)
    monkeypatch.setattr("fewstep.core.batching.MAX_DECODE_PIXELS", 64 * 64)
    handles = [
        tiny.transformer.all_final_layer["2-1"].register_forward_pre_hook(
            lambda _, inputs: sampled.append(len(inputs[0]))
        ),
        tiny.vae.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(len(inputs[0]))),
    ]
    try:
        assert len(images_of(tiny, steps=2, guidance_scale=0)) == len(PROMPTS)
        assert difference(images_of(tiny, steps=2), expected) <= 1
    finally:
        for handle in handles:
            handle.remove()
    assert max(sampled[:4]) <= 2
    assert set(decoded) == {1}


def test_seeds_count_up_from_the_first(tiny):
    first = images_of(tiny, PROMPTS[:2], seed=5, steps=2)
    assert torch.equal(first, images_of(tiny, PROMPTS[:2], seeds=(5, 6), steps=2))
    assert not torch.equal(first, images_of(tiny, PROMPTS[:2], seed=6, steps=2))


# --- callbacks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "sde"])
def test_callback_receives_every_step_once(tiny, sampler):
    received = []
    params = SamplingParams(steps=3, batch_size=2, sampler=sampler)
    made = generate(tiny, PROMPTS, params, received.append)
    assert [(list(step.images), step.step) for step in received] == [
        *(([0, 1], step) for step in (1, 2, 3)),
        *(([2], step) for step in (1, 2, 3)),
    ]
    assert {step.steps for step in received} == {3}
    assert sum(step.finished for step in received) == 3
    for step in received:
        assert step.x0.shape == (len(step.images), 16, 8, 8)
    last = received[-1]
    torch.testing.assert_close(last.x0, last.sampler_step.x_next)  # at the terminal 0 nothing but data is left
    assert torch.equal(made.images, images_of(tiny, steps=3, batch_size=2, sampler=sampler))


@pytest.mark.parametrize("how", ["returns False", "raises"])
def test_cancel_in_the_middle_of_a_batch_leaves_the_model_usable(tiny_folder, how):
    model = load(tiny_folder)
    with_adapters(model, "style")
    params = SamplingParams(steps=4, batch_size=2, adapters={"style": 1.0})
    expected = images_of(model, PROMPTS[::-1], steps=4, batch_size=2)
    calls = []

    def cancel(step):
        calls.append(step.step)
        if len(calls) < 6:
            return None
        if how == "raises":
            raise GenerationCancelled("the client disconnected")
        return False

    before = {name: tensor.clone() for name, tensor in model.transformer.state_dict().items()}
    with pytest.raises(GenerationCancelled, match="disconnected" if how == "raises" else "after step 2 of 4"):
        generate(model, PROMPTS, params, cancel)
    assert calls == [1, 2, 3, 4, 1, 2]
    for name, tensor in model.transformer.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert torch.equal(images_of(model, PROMPTS[::-1], steps=4, batch_size=2), expected)


# --- LoRA adapters ----------------------------------------------------------------------------------------------


def with_adapters(model, *names):
    """Adds LoRA adapters with random weights."""
    for index, name in enumerate(names):
        add_adapter(model.transformer, name, 2, 1.0, target_modules=model.family.lora_target_modules)
        torch.manual_seed(index)
        for parameter in adapter_parameters(model.transformer, name).values():
            torch.nn.init.normal_(parameter, std=0.1)


def test_adapters_are_active_for_one_call_at_their_scales(tiny_folder):
    model = load(tiny_folder)
    base = images_of(model, steps=2)
    with_adapters(model, "style", "subject")
    style = images_of(model, steps=2, adapters={"style": 1.0})
    assert difference(style, base) > 1
    assert difference(images_of(model, steps=2, adapters={"style": 0.5}), style) > 1
    assert difference(images_of(model, steps=2, adapters={"style": 0.0}), base) <= 1
    both = images_of(model, steps=2, adapters={"style": 1.0, "subject": 1.0})
    assert difference(both, style) > 1
    assert torch.equal(images_of(model, steps=2, adapters={"subject": 1.0, "style": 1.0}), both)
    assert difference(images_of(model, steps=2), base) <= 1
