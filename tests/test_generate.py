"""Loading, saving and generating, against diffusers' own pipeline; and the mistakes a user can make on the way."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.core.guidance import ClassifierFreeGuidance
from fewstep.core.samplers import sample_euler
from fewstep.errors import UserError
from fewstep.inference.generate import generate, max_batch_size
from fewstep.models.noise import initial_noise
from fewstep.models.offload import offload_blocks
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.models.text import apply_chat_template

PROMPTS = ["a noto emoji of a red apple on a blue background", "蓝色背景上的红苹果，twemoji 风格", "a fox " * 12]


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
    ("steps", "guidance", "options", "forwards"),
    [
        (4, 0.0, {}, 4),
        (8, 0.0, {}, 8),
        (5, 2.5, {}, 10),
        (5, 4.0, {"negative_prompt": "a blue dog"}, 10),
        (5, 4.0, {"cfg_normalization": 1.0}, 10),
        (5, 4.0, {"cfg_truncation": 0.3, "cfg_normalization": 0.9, "negative_prompt": "a dog"}, 8),
    ],
)
def test_same_images_as_diffusers(tiny_folder, steps, guidance, options, forwards):
    ours = generate(load(tiny_folder), PROMPTS, seed=7, steps=steps, guidance_scale=guidance, **options)
    each = {name: [value] * len(PROMPTS) if isinstance(value, str) else value for name, value in options.items()}
    theirs = diffusers_images(tiny_folder, steps, guidance, seed=7, **each)
    assert ours.images.shape == theirs.shape == (3, 64, 64, 3)
    assert theirs.std() > 1
    # an average rounding apart would do; here at most single pixels may fall on the other side of a half
    difference = np.abs(ours.images.numpy().astype(int) - theirs.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3
    assert ours.nfe == forwards
    if options:
        plain = generate(load(tiny_folder), PROMPTS, seed=7, steps=steps, guidance_scale=guidance)
        assert (ours.images.int() - plain.images.int()).abs().max() > 1


def test_prompts_are_encoded_as_diffusers_does(tiny, tiny_folder):
    pipeline = ZImagePipeline.from_pretrained(tiny_folder)
    theirs, null = pipeline.encode_prompt(list(PROMPTS))
    ours = tiny.encode([*PROMPTS, ""])
    for row, expected in enumerate([*theirs, null[0]]):
        assert ours.lengths[row] == len(expected)
        torch.testing.assert_close(ours.features[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)
        assert (ours.features[row, len(expected) :] == 0).all()


@pytest.mark.parametrize(("system", "thinking"), [("You draw.", ""), ("", "It is red."), ("You draw.", "It is red.")])
def test_system_prompt_and_thinking_go_around_the_prompt(tiny, system, thinking):
    """Held to the words written out here, padded to 512 as diffusers does."""
    asked = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    asked += "<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\n"
    asked += f"<think>\n{thinking}\n</think>\n\n" if thinking else ""
    tokens = tiny.tokenizer(asked, padding="max_length", max_length=512, return_tensors="pt")
    expected = tiny.text_encoder(**tokens, output_hidden_states=True).hidden_states[-2][tokens.attention_mask.bool()]
    found = tiny.encode(["a fox"], system=system, assistant_prefix=thinking)
    assert found.lengths.item() == len(expected)
    torch.testing.assert_close(found.features[0], expected, atol=1e-5, rtol=1e-5)
    assert tiny.encode(["a fox"]).lengths.item() < len(expected)  # what was kept of the one is not given for the other


def test_a_cards_system_prompt_is_taken_unless_another_is_given(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    card = json.loads((folder / "fewstep.json").read_text())
    (folder / "fewstep.json").write_text(json.dumps(card | {"system_prompt": "You draw."}))
    mine, plain = load(folder), load(tiny_folder)
    first = generate(mine, ["a fox"], steps=2).images
    assert torch.equal(first, generate(plain, ["a fox"], steps=2, system_prompt="You draw.").images)
    assert torch.equal(
        generate(mine, ["a fox"], steps=2, system_prompt="").images, generate(plain, ["a fox"], steps=2).images
    )
    assert not torch.equal(first, generate(plain, ["a fox"], steps=2).images)


@pytest.mark.parametrize(("steps", "guidance", "shift"), [(8, 0.0, 3.0), (50, 4.0, 6.0)])
def test_same_latents_as_diffusers(tiny_folder, tmp_path, steps, guidance, shift):
    """Z-Image-Turbo as it is run, its sigmas given, and Z-Image."""
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


@pytest.mark.parametrize(("shift", "forwards"), [(3.0, 8), (6.0, 100)])
def test_a_folder_that_others_wrote_is_run_as_its_like(tiny_folder, tmp_path, shift, forwards):
    """Without fewstep.json its shift says what it is: Z-Image-Turbo's is 3, Z-Image's 6."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "fewstep.json").unlink()
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift": shift}))
    with pytest.warns(
        UserWarning, match=rf"no fewstep.json; by its shift of {shift:g} .* {8 if shift == 3 else 50} steps"
    ):
        model = load(folder)
    assert generate(model, ["a fox"], height=32, width=32).nfe == forwards
    turbo = [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3]
    if shift == 3:
        assert model.sigmas(8) == pytest.approx(turbo, abs=1e-4)


def test_parts_that_rest_come_only_while_they_are_asked(tiny_folder, monkeypatch):
    model, moved = load(tiny_folder), []
    expected = generate(model, ["a fox"], steps=2).images
    model = load(tiny_folder)
    for name in ("text_encoder", "vae"):
        part = getattr(model, name)
        go = part.to
        monkeypatch.setattr(part, "to", lambda where, name=name, go=go: (moved.append((name, str(where))), go(where)))
    monkeypatch.setattr(TextToImagePipeline, "device", property(lambda _: torch.device("cpu:0")))
    model.enable_model_cpu_offload()
    assert moved == [("text_encoder", "cpu"), ("vae", "cpu")]
    moved.clear()
    for _ in range(2):  # the prompts of the second time are known
        assert torch.equal(generate(model, ["a fox"], steps=2).images, expected)
    there = [("text_encoder", "cpu:0"), ("text_encoder", "cpu")]
    back = [("vae", "cpu:0"), ("vae", "cpu")]
    assert moved == there + there + back + back  # the prompt, the null prompt; two images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_blocks_are_there_only_while_they_speak(tiny_folder, dtype):
    """On the device that is not there, "meta", all but the blocks' homes have no contents."""
    model = load(tiny_folder, dtype=dtype)
    expected = {name: tensor.clone() for name, tensor in model.transformer.state_dict().items()}
    met = []
    offload_blocks(model.denoiser, "meta")
    for block in model.transformer.layers:
        block.attention.to_q.register_forward_pre_hook(
            lambda module, _, block=block: met.append({str(p.device) for p in block.parameters()})
        )
    x = torch.randn(1, 16, 8, 8, device="meta")
    prompts = model.encode(["a fox"])
    with torch.no_grad():
        velocity = model.denoiser._velocity(x, torch.ones(1, device="meta"), prompts.to("meta"), 32)
    assert velocity.device.type == "meta"
    assert met == [{"meta"}, {"meta"}]
    for name, tensor in model.transformer.state_dict().items():
        inside = name.startswith(("layers", "noise_refiner", "context_refiner"))
        assert tensor.device.type == ("cpu" if inside else "meta")
        assert not inside or torch.equal(tensor.float(), expected[name].float())


def test_null_prompt_is_the_encoded_empty_prompt(tiny):
    null = tiny.encode([""])
    assert null.lengths.item() > 3  # the template's own tokens
    assert null.features.abs().mean() > 0.01
    assert apply_chat_template(tiny.tokenizer, "").startswith("<|im_start|>user\n<|im_end|>")


def test_image_does_not_depend_on_its_batch(tiny):
    together = generate(tiny, PROMPTS, seeds=[1, 2, 3], steps=3).images
    alone = torch.cat([generate(tiny, [p], seeds=[s], steps=3).images for p, s in zip(PROMPTS, [1, 2, 3], strict=True)])
    assert (together.int() - alone.int()).abs().max() <= 1
    for size in (1, 2):
        parts = generate(tiny, PROMPTS, seeds=[1, 2, 3], steps=3, batch_size=size, sampler="renoise").images
        whole = generate(tiny, PROMPTS, seeds=[1, 2, 3], steps=3, sampler="renoise").images
        assert (parts.int() - whole.int()).abs().max() <= 1
    euler = generate(tiny, PROMPTS, seeds=[1, 2, 3], steps=3).images
    still = generate(tiny, PROMPTS, seeds=[1, 2, 3], steps=3, sampler="renoise", eta=0.0).images
    assert (euler.int() - still.int()).abs().max() <= 1
    assert (euler.int() - whole.int()).abs().max() > 1
    with pytest.raises(UserError, match="eta 2"):
        generate(tiny, PROMPTS, eta=2)


def test_large_images_are_drawn_and_decoded_a_few_at_a_time(tiny, monkeypatch):
    assert [max_batch_size(side, side) for side in (64, 128, 512, 1024, 4096)] == [64, 64, 8, 2, 1]
    expected, drawn, decoded = generate(tiny, PROMPTS, steps=2).images, [], []
    monkeypatch.setattr("fewstep.inference.generate.MAX_PIXELS_PER_BATCH", 2 * 64 * 64)
    monkeypatch.setattr("fewstep.inference.generate.MAX_DECODE_PIXELS", 64 * 64)
    handles = [
        tiny.transformer.all_final_layer["2-1"].register_forward_pre_hook(
            lambda _, inputs: drawn.append(len(inputs[0]))
        ),
        tiny.vae.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(len(inputs[0]))),
    ]
    done = []
    try:
        found = generate(tiny, PROMPTS, steps=2, guidance_scale=0, progress=done.append).images
        assert (generate(tiny, PROMPTS, steps=2).images.int() - expected.int()).abs().max() <= 1
    finally:
        for handle in handles:
            handle.remove()
    assert len(found) == len(PROMPTS) == sum(done)
    assert max(drawn[:4]) <= 2
    assert set(decoded) == {1}


def test_seeds(tiny):
    first = generate(tiny, PROMPTS[:2], seed=5, steps=2).images
    assert torch.equal(first, generate(tiny, PROMPTS[:2], seeds=[5, 6], steps=2).images)
    assert not torch.equal(first, generate(tiny, PROMPTS[:2], seed=6, steps=2).images)


def test_card_decides_what_is_unset(tiny):
    assert generate(tiny, PROMPTS[:1]).nfe == 12  # 6 steps, guided
    assert generate(tiny, PROMPTS[:1], guidance_scale=0).nfe == 6


def test_saving_is_loading_back(tiny, tiny_folder):
    back = load(tiny_folder)
    assert back.generation_config == tiny.generation_config
    for mine, theirs in ((tiny.transformer, back.transformer), (tiny.vae, back.vae)):
        for (name, a), b in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    assert not list(tiny_folder.parent.glob(".*draft"))
    files = [file for file in tiny_folder.rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    assert not files


def test_guidance_distilled_models(tiny_folder, tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(tiny_folder, folder)
    card = json.loads((folder / "fewstep.json").read_text())
    card |= {"steps": 4, "guidance_scale": 0.0, "guidance_distilled": True, "sigmas": [1.0, 0.9, 0.75, 0.5]}
    (folder / "fewstep.json").write_text(json.dumps(card))
    student = load(folder)
    assert generate(student, PROMPTS[:1]).nfe == 4
    with pytest.raises(UserError, match="guidance distilled into it"):
        generate(student, PROMPTS[:1], guidance_scale=3)
    with pytest.warns(UserWarning, match="trained for 4 steps, not 9"):
        generate(student, PROMPTS[:1], steps=9)


def test_opens_where_fewstep_is_not_installed(tiny_folder):
    """A process that cannot import fewstep opens the folder and runs it."""
    program = f"""
import sys
sys.modules["fewstep"] = None
import torch
from diffusers import ZImagePipeline
pipeline = ZImagePipeline.from_pretrained({str(tiny_folder)!r})
image = pipeline("a fox", height=64, width=64, num_inference_steps=4, guidance_scale=0,
                 generator=torch.Generator("cpu").manual_seed(3)).images[0]
print(image.size)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(64, 64)", done.stderr


# --- mistakes ---------------------------------------------------------------------------------------------------


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def one_line(done, *parts):
    assert done.exit_code == 1, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.output
    for part in parts:
        assert str(part) in lines[0]


@pytest.fixture
def damaged(tiny_folder, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)
    return folder


def test_corrupt_weights(damaged, tmp_path):
    file = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    out = tmp_path / "out.png"
    out.write_text("mine")
    one_line(run("generate", damaged, "a fox", "-o", out), damaged / "transformer", "cannot be loaded")
    assert out.read_text() == "mine"  # what was there is not lost


def test_missing_part(damaged, tmp_path):
    shutil.rmtree(damaged / "vae")
    one_line(run("generate", damaged, "a fox", "-o", tmp_path / "out.png"), damaged / "vae")


def test_bad_card(damaged, tmp_path):
    (damaged / "fewstep.json").write_text('{"steps": 0}')
    one_line(run("generate", damaged, "a fox", "-o", tmp_path / "out.png"), damaged / "fewstep.json", "steps")


def test_prompt_too_long(tiny_folder, tmp_path):
    one_line(run("generate", tiny_folder, "fox " * 3000, "-o", tmp_path / "out.png"), "tokens, at most 512")
    assert not (tmp_path / "out.png").exists()


def test_sizes_that_do_not_fit(tiny_folder, tmp_path):
    one_line(
        run("generate", tiny_folder, "a fox", "--height", 65, "-o", tmp_path / "o.png"), "height 65", "multiple of 16"
    )


def test_command_line(tiny_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n\n一只狐狸\n", encoding="utf-8")
    out = tmp_path / "grid.png"
    done = run("generate", tiny_folder, "a bear", "--prompts-file", prompts, "-o", out, "--seed", 1, "--steps", 2)
    assert done.exit_code == 0, done.output
    assert "3 images" in done.stdout
    assert out.is_file()
    done = run("generate", tiny_folder, "a bear", "-o", tmp_path / "many", "--guidance-scale", 0, "--width", 32)
    assert done.exit_code == 0, done.output
    assert [file.name for file in (tmp_path / "many").iterdir()] == ["0000.png"]


def test_bf16_weights_draw_nearly_the_same(tiny_folder):
    whole, half = (load(tiny_folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    images = [generate(model, ["a fox", "a dog"], steps=3).images.float() for model in (whole, half)]
    assert (images[0] - images[1]).abs().mean() < 2  # of 255


def test_options_of_speed_and_memory(tiny_folder, tmp_path):
    plain, saving = tmp_path / "plain.png", tmp_path / "saving.png"
    assert run("generate", tiny_folder, "a fox", "-o", plain).exit_code == 0
    for offload in ("model", "group"):
        done = run("generate", tiny_folder, "a fox", "-o", saving, "--offload", offload, "--attention", "native")
        assert done.exit_code == 0, done.output
        assert plain.read_bytes() == saving.read_bytes()
    assert run("generate", tiny_folder, "a fox", "-o", saving, "--tiling").exit_code == 0
    one_line(run("generate", tiny_folder, "a fox", "-o", plain, "--compile", "--offload", "group"), "not together")
    one_line(run("generate", tiny_folder, "a fox", "-o", plain, "--attention", "guess"), "attention guess")
    one_line(run("generate", tiny_folder, "a fox", "-o", plain, "--attention", "flash"), "attention flash")


def test_large_images_are_decoded_in_tiles(tiny_folder):
    model, sizes = load(tiny_folder), []
    model.vae.tile_sample_min_size, model.vae.tile_latent_min_size = 64, 8
    model.vae.enable_tiling()
    model.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-1]))
    assert model.decode(torch.randn(1, 16, 16, 16)).shape == (1, 3, 128, 128)
    assert len(sizes) > 1
    assert max(sizes) == 8


def test_fp16_is_refused_with_the_reason(tiny_folder):
    with pytest.raises(UserError, match="overflow in it; take bf16"):
        load(tiny_folder, dtype=torch.float16)
    done = CliRunner().invoke(app, ["generate", str(tiny_folder), "a fox", "--precision", "fp16"])
    assert done.exit_code == 1
    assert "overflow" in done.output
