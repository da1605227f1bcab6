"""LoRA files in use: generation, merging, extraction, resizing, mixing; the commands of `fewstep lora`."""

import shutil

import lora_files as made
import pytest
import torch
from lora_cli import character, run, style, succeed
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fewstep
from fewstep.errors import UserError
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.lora.merge import merge_, parse_lora, read_loras
from fewstep.models.lora.metadata import lora_metadata, trained_on
from fewstep.models.lora.targets import targets_of
from fewstep.models.pipeline import load
from fewstep.models.quantize import FP8
from fewstep.models.zimage.family import ZIMAGE

__all__ = ["character", "style"]  # fixtures

FAST = SamplingParams(seed=3, steps=2, guidance_scale=0)


def test_several_loras_are_as_merged_by_hand(tiny, tiny_folder, character, style, tmp_path, capsys):
    """By the API, by the command and by a merged folder, to the last bit of every image."""
    first = made.deltas(made.adapter_for(tiny.transformer, seed=1))
    _, second = made.fused(made.adapter_for(tiny.transformer, made.LAYERS[:5], rank=2, seed=2))
    by_hand = tiny.with_transformer(made.merged_by_hand(tiny, (first, 0.8), (second, 0.6)), tiny.generation_config)
    model = fewstep.load(tiny_folder, "cpu", loras={str(character): 0.8, str(style): 0.6})
    for name, weight in model.transformer.state_dict().items():
        torch.testing.assert_close(weight, by_hand.transformer.state_dict()[name], atol=1e-6, rtol=1e-6)
    assert "character.safetensors: 7 modules bound to 7 of " in capsys.readouterr().err
    images = generate(model, ["a dog"], FAST).images
    assert (images.int() - generate(by_hand, ["a dog"], FAST).images.int()).abs().max() <= 1
    assert not torch.equal(images, generate(load(tiny_folder), ["a dog"], FAST).images)

    words = ("--seed", 3, "--steps", 2, "--guidance-scale", 0)
    loras = ("--lora", f"{character}:0.8", "--lora", f"{style}:0.6")
    succeed("generate", tiny_folder, "a dog", "-o", tmp_path / "one.png", *loras, *words)
    succeed("lora", "merge", tiny_folder, f"{style}:0.6", f"{character}:0.8", "--out", tmp_path / "merged")
    succeed("generate", tmp_path / "merged", "a dog", "-o", tmp_path / "two.png", *words)
    one, two = (Image.open(tmp_path / name) for name in ("one.png", "two.png"))
    assert one.tobytes() == two.tobytes()


@pytest.mark.filterwarnings("ignore:weights in fp8")
def test_fp8_weights_are_quantized_after_merging(tiny, tiny_folder, character, tmp_path):
    """Bit for bit the images of the merged model in fp8."""
    base, merged = tmp_path / "base", tmp_path / "merged"
    succeed("convert", tiny_folder, "--out", base, "--dtype", "bf16")
    succeed("lora", "merge", base, f"{character}:0.5", "--out", merged)
    models = [load(base, "cpu", FP8, loras={str(character): 0.5}), load(merged, "cpu", FP8), load(base, "cpu", FP8)]
    images = [generate(model, ["a dog"], FAST).images for model in models]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    with pytest.raises(ValueError, match="merge adapters before quantizing"):
        merge_(models[0].transformer, read_loras({str(character): 1.0}, targets_of(tiny.transformer, ZIMAGE)))


def test_the_order_of_adapters_does_not_matter_in_bf16(tiny, tiny_folder, character, style):
    both = [{str(one): 0.7, str(other): 1.3} for one, other in ((character, style),)]
    both.append(dict(reversed(both[0].items())))
    states = [load(tiny_folder, "cpu", torch.bfloat16, loras=each).transformer.state_dict() for each in both]
    assert all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())


def test_images_of_another_strength_are_other_images(tiny_folder, character, tmp_path):
    words = ("generate", tiny_folder, "a dog", "-o", f"{tmp_path}/many/", "--steps", 1)
    succeed(*words, "--lora", f"{character}:0.5")
    moved = shutil.copytree(character.parent, tmp_path.parent / f"{tmp_path.name}-moved") / character.name
    shutil.copystat(character, moved)
    assert "were made earlier" in succeed(*words, "--lora", f"{moved}:0.5").stdout
    done = run(*words, "--lora", character)
    assert done.exit_code == 1
    assert "holds images of another generation (other loras)" in done.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a.safetensors", 1.0), ("a.safetensors:0.8", 0.8), ("a.safetensors:-1", -1.0), ("C:\\x\\a.safetensors", 1.0)],
)
def test_strengths(text, expected):
    assert parse_lora(text) == (text.removesuffix(":0.8").removesuffix(":-1"), expected)


def test_a_base_lora_on_a_student_is_remarked_once(tiny, tiny_folder, style, tmp_path):
    student = tmp_path / "student"
    config = tiny.generation_config.model_copy(update={"guidance_scale": 0.0, "guidance_distilled": True})
    tiny.with_transformer(tiny.transformer, config).save(student)
    remark = "trained on a multi-step model, and this is a few-step one"
    for model, times in ((student, 1), (tiny_folder, 0)):
        done = succeed("generate", model, "a dog", "a cat", "-o", tmp_path / "a.png", "--steps", 1, "--lora", style)
        assert done.stderr.count(remark) == times


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (lora_metadata("a", kind="base"), "base"),
        (lora_metadata("a", kind="student", base_model="Tongyi-MAI/Z-Image"), "student"),
        ({"ss_sd_model_name": "z_image_turbo_bf16.safetensors"}, "student"),
        ({"ss_sd_model_name": "z_image_bf16.safetensors"}, "base"),
        ({"base_model_name_or_path": "Tongyi-MAI/Z-Image"}, "base"),
        ({"base_model_name_or_path": "Tongyi-MAI/Z-Image-Turbo"}, "student"),
        ({"modelspec.architecture": "z-image-turbo/lora"}, "student"),
        ({"modelspec.architecture": "Z-Image/lora"}, None),  # trainers write it for both
        ({}, None),
    ],
)
def test_what_a_lora_was_trained_on(metadata, expected):
    assert trained_on(metadata) == expected


def test_modelspec_has_its_required_keys():
    found = lora_metadata("mine", architecture="z-image", trigger="mypetcat", resolution=512)
    for key in ("sai_model_spec", "architecture", "implementation", "title", "date"):
        assert found[f"modelspec.{key}"]
    assert found["modelspec.trigger_phrase"] == "mypetcat"
    assert found["modelspec.resolution"] == "512x512"
    assert "modelspec.merged_from" not in found


# --- check, info, convert ---------------------------------------------------------------------------------------------


def test_check_fails_where_nothing_changes(tiny, tiny_folder, character, tmp_path):
    done = succeed("lora", "check", tiny_folder, character, "--out", tmp_path / "pair.png", "--prompt", "a dog")
    assert "changes the image: " in done.stdout
    assert (tmp_path / "pair.png").is_file()
    zeros = {key: 0 * tensor if "lora_up" in key else tensor for key, tensor in load_file(character).items()}
    save_file(zeros, tmp_path / "zeros.safetensors")
    done = run("lora", "check", tiny_folder, tmp_path / "zeros.safetensors")
    assert done.exit_code == 1
    assert "changes nothing: the images with and without it are identical" in done.stderr
    assert run("lora", "check", tiny_folder, f"{character}:0").exit_code == 1


def test_info(tiny, character, style, tmp_path):
    out = succeed("lora", "info", character).stdout
    assert "LoRA, 7 modules, 7 linear layers, float32" in out
    assert "rank: 3 to 4; alpha / rank: 0.375 to 0.5" in out
    assert "attention.to_q (2)" in out
    adapter = made.adapter_for(tiny.transformer, seed=1)
    norm = made.deltas(adapter)["layers.1.feed_forward.w2"].norm().item()
    assert f"{norm:.4g}" in next(line for line in out.splitlines() if "layers.1" in line)
    assert "trained on: a multi-step model" in succeed("lora", "info", style).stdout


def test_convert_keeps_dtype_and_metadata_and_drops_what_no_longer_holds(tiny, character, tmp_path):
    metadata = {"modelspec.title": "Ann", "ss_network_alpha": "7", "lora_adapter_metadata": '{"transformer.r": 3}'}
    file = made.save(tmp_path / "a.safetensors", load_file(character), metadata, torch.bfloat16)
    succeed("lora", "convert", file, "--out", tmp_path / "b.safetensors", "--to", "diffusers")
    with safe_open(tmp_path / "b.safetensors", "pt") as tensors:
        written = tensors.metadata()
        assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"BF16"}  # noqa: SIM118
    assert written["modelspec.title"] == "Ann"
    assert written["modelspec.sai_model_spec"] == "1.0.0"
    assert not {"ss_network_alpha", "lora_adapter_metadata"} & written.keys()


def test_ignored_keys(tiny_folder, character, tmp_path):
    file = tmp_path / "both.safetensors"
    save_file(load_file(character) | {"lora_te1_layers_0_mlp.alpha": torch.ones(())}, file)
    assert run("generate", tiny_folder, "a dog", "-o", tmp_path / "a.png", "--lora", file).exit_code == 1
    more = ("--ignore", "lora_te1_*", "--steps", 1)
    succeed("generate", tiny_folder, "a dog", "-o", tmp_path / "a.png", "--lora", file, *more)


def test_python_errors_are_user_errors(tiny_folder, character):
    with pytest.raises(UserError, match="the strength nan is no finite number"):
        fewstep.load(tiny_folder, "cpu", loras={str(character): float("nan")})
    with pytest.raises(UserError, match=r"--ignore nothing: no key of .*character.* matches it"):
        fewstep.load(tiny_folder, "cpu", loras={str(character): 1.0}, ignore=["nothing"])
