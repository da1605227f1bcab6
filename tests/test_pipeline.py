"""Pipelines: prompt encoding, loading and saving, offloading, data types, tiles."""

import subprocess
import sys

import pytest
import torch
from diffusers import ZImagePipeline

from fewstep.errors import UserError
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.offload import offload_blocks
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.models.text import apply_chat_template

PROMPTS = ["a noto emoji of a red apple on a blue background", "蓝色背景上的红苹果，twemoji 风格", "a fox " * 12]


def images_of(pipeline, *prompts, **options):
    return generate(pipeline, prompts, SamplingParams(**options)).images


def test_prompts_are_encoded_as_by_diffusers(tiny, tiny_folder):
    pipeline = ZImagePipeline.from_pretrained(tiny_folder)
    theirs, null = pipeline.encode_prompt(list(PROMPTS))
    ours = tiny.encode([*PROMPTS, ""])
    for row, expected in enumerate([*theirs, null[0]]):
        assert ours.lengths[row] == len(expected)
        torch.testing.assert_close(ours.features[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)
        assert (ours.features[row, len(expected) :] == 0).all()


@pytest.mark.parametrize(("system", "prefix"), [("You draw.", ""), ("", "It is red."), ("You draw.", "It is red.")])
def test_system_prompt_and_assistant_prefix_surround_the_prompt(tiny, system, prefix):
    """Against the template written out here, padded to 512 tokens as in diffusers."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    text += "<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\n"
    text += f"<think>\n{prefix}\n</think>\n\n" if prefix else ""
    tokens = tiny.tokenizer(text, padding="max_length", max_length=512, return_tensors="pt")
    expected = tiny.text_encoder(**tokens, output_hidden_states=True).hidden_states[-2][tokens.attention_mask.bool()]
    found = tiny.encode(["a fox"], system=system, assistant_prefix=prefix)
    assert found.lengths.item() == len(expected)
    torch.testing.assert_close(found.features[0], expected, atol=1e-5, rtol=1e-5)
    assert tiny.encode(["a fox"]).lengths.item() < len(expected)  # the cache distinguishes them


def test_null_prompt_is_the_encoded_empty_prompt(tiny):
    null = tiny.encode([""])
    assert null.lengths.item() > 3  # the template's tokens
    assert null.features.abs().mean() > 0.01
    assert apply_chat_template(tiny.tokenizer, "").startswith("<|im_start|>user\n<|im_end|>")


def test_offloaded_components_are_on_the_device_only_while_in_use(tiny_folder, monkeypatch):
    model, moves = load(tiny_folder), []
    expected = images_of(model, "a fox", steps=2)
    model = load(tiny_folder)
    for name in ("text_encoder", "vae"):
        component = getattr(model, name)
        to = component.to
        monkeypatch.setattr(
            component, "to", lambda where, name=name, to=to: (moves.append((name, str(where))), to(where))
        )
    monkeypatch.setattr(TextToImagePipeline, "device", property(lambda _: torch.device("cpu:0")))
    model.enable_model_cpu_offload()
    assert moves == [("text_encoder", "cpu"), ("vae", "cpu")]
    moves.clear()
    for _ in range(2):  # the second time the prompts are cached
        assert torch.equal(images_of(model, "a fox", steps=2), expected)
    encoding = [("text_encoder", "cpu:0"), ("text_encoder", "cpu")]
    decoding = [("vae", "cpu:0"), ("vae", "cpu")]
    assert moves == encoding + encoding + decoding + decoding  # the prompt, the null prompt; two images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_offloaded_blocks_are_on_the_device_only_during_their_forward(tiny_folder, dtype):
    """The device is "meta", on which tensors have no contents; the blocks' CPU copies keep theirs."""
    model = load(tiny_folder, dtype=dtype)
    expected = {name: tensor.clone() for name, tensor in model.transformer.state_dict().items()}
    devices = []
    offload_blocks(model.denoiser, "meta")
    for block in model.transformer.layers:
        block.attention.to_q.register_forward_pre_hook(
            lambda module, _, block=block: devices.append({str(p.device) for p in block.parameters()})
        )
    x = torch.randn(1, 16, 8, 8, device="meta")
    prompts = model.encode(["a fox"])
    with torch.no_grad():
        velocity = model.denoiser._velocity(x, torch.ones(1, device="meta"), prompts.to("meta"), 32)
    assert velocity.device.type == "meta"
    assert devices == [{"meta"}, {"meta"}]
    for name, tensor in model.transformer.state_dict().items():
        in_block = name.startswith(("layers", "noise_refiner", "context_refiner"))
        assert tensor.device.type == ("cpu" if in_block else "meta")
        assert not in_block or torch.equal(tensor.float(), expected[name].float())


@pytest.mark.parametrize("first", ["offloaded", "compiled"])
def test_blocks_are_offloaded_and_compiled_in_either_order(tiny_folder, monkeypatch, first):
    """Copies of the weights stand for those on a device: the compiled graphs get these, and are compiled once."""
    model = load(tiny_folder, "cpu")
    prompts, x = model.encode(["a fox"]), torch.randn(1, 16, 8, 8)
    expected = model.denoiser(x, torch.ones(1), prompts)
    graphs, given = [], set()

    def backend(graph, inputs):
        graphs.append(graph)

        def run(*inputs):
            given.update(tensor.data_ptr() for tensor in inputs if isinstance(tensor, torch.Tensor))
            return graph.forward(*inputs)

        return run

    torch._dynamo.reset()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda compute, dynamic: compile(compute, dynamic=dynamic, backend=backend))
    for work in ("offloaded", "compiled") if first == "offloaded" else ("compiled", "offloaded"):
        if work == "offloaded":
            offload_blocks(model.denoiser, "cpu:0")
        else:
            model.denoiser.compile_repeated_blocks()
    home = {p.data_ptr() for block in model.denoiser.get_blocks() for p in block.parameters()}
    to = torch.Tensor.to
    copied = lambda tensor, *where, **named: (  # noqa: E731
        tensor.clone() if "cpu:0" in map(str, (*where, *named.values())) else to(tensor, *where, **named)
    )
    monkeypatch.setattr(torch.Tensor, "to", copied)
    for _ in range(3):
        assert torch.equal(model.denoiser(x, torch.ones(1), prompts), expected)
    assert 0 < len(graphs) <= 3  # a noise refiner's, a context refiner's and a layer's
    assert given
    assert not home & given


def test_offloading_is_not_undone_by_a_move(tiny_folder, monkeypatch):
    blocks = load(tiny_folder, "cpu", offload="group")
    with pytest.raises(UserError, match="to cpu: the blocks of this model are offloaded; load it again"):
        blocks.to("cpu")
    with pytest.raises(UserError, match="offload: the blocks of this model are offloaded already"):
        offload_blocks(blocks.denoiser, "meta")
    components = load(tiny_folder, "cpu", offload="model")
    monkeypatch.setattr("fewstep.models.pipeline.resolve_device", torch.device)  # as if "meta" had contents
    components.to("meta")
    assert components.device.type == "meta"
    assert {next(part.parameters()).device.type for part in (components.text_encoder, components.vae)} == {"cpu"}


def test_saved_and_loaded_pipelines_are_equal(tiny, tiny_folder):
    loaded = load(tiny_folder)
    assert loaded.generation_config == tiny.generation_config
    for ours, theirs in ((tiny.transformer, loaded.transformer), (tiny.vae, loaded.vae)):
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    assert not list(tiny_folder.parent.glob(".*draft"))
    files = [file for file in tiny_folder.rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    assert not files


def test_saved_folder_runs_without_fewstep(tiny_folder):
    """A process that cannot import fewstep loads the folder with diffusers and runs it."""
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


def test_bf16_weights_give_nearly_the_same_images(tiny_folder):
    full, half = (load(tiny_folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    images = [images_of(model, "a fox", "a dog", steps=3).float() for model in (full, half)]
    assert (images[0] - images[1]).abs().mean() < 2  # of 255


def test_fp16_is_refused_with_the_reason(tiny_folder):
    with pytest.raises(UserError, match="overflow"):
        load(tiny_folder, dtype=torch.float16)


def test_large_images_are_decoded_in_tiles(tiny_folder):
    model, sizes = load(tiny_folder), []
    model.vae.tile_sample_min_size, model.vae.tile_latent_min_size = 64, 8
    model.vae.enable_tiling()
    model.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-1]))
    assert model.decode(torch.randn(1, 16, 16, 16)).shape == (1, 3, 128, 128)
    assert len(sizes) > 1
    assert max(sizes) == 8
