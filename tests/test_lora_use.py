"""LoRA files in use: generation, merging, extraction, resizing, mixing; the commands of `fewstep lora`."""

import copy
import shutil

import lora_files as made
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fewstep
from fewstep.cli.main import app
from fewstep.errors import UserError
from fewstep.export.lora_svd import choose_rank, truncate, truncate_low_rank
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.lora.merge import merge_, parse_lora, read_loras
from fewstep.models.lora.metadata import lora_metadata, trained_on
from fewstep.models.lora.targets import targets_of
from fewstep.models.lora.weights import LowRank
from fewstep.models.pipeline import load
from fewstep.models.quantize import FP8
from fewstep.models.zimage.family import ZIMAGE

FAST = SamplingParams(seed=3, steps=2, guidance_scale=0)


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def succeed(*words):
    done = run(*words)
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture
def character(tiny, tmp_path):
    return made.save(tmp_path / "character.safetensors", made.kohya(made.adapter_for(tiny.transformer, seed=1)))


@pytest.fixture
def style(tiny, tmp_path):
    adapter = made.adapter_for(tiny.transformer, made.LAYERS[:5], rank=2, seed=2)
    return made.save(tmp_path / "style.safetensors", made.fused(adapter)[0], lora_metadata("style", kind="base"))


def merged_by_hand(tiny, *weighted):
    """A copy of the transformer with changes {layer: delta} times strengths."""
    transformer = copy.deepcopy(tiny.transformer)
    with torch.no_grad():
        for changes, strength in weighted:
            for layer, delta in changes.items():
                transformer.get_submodule(layer).weight += strength * delta
    return transformer


def test_several_loras_are_as_merged_by_hand(tiny, tiny_folder, character, style, tmp_path, capsys):
    """By the API, by the command and by a merged folder, to the last bit of every image."""
    first = made.deltas(made.adapter_for(tiny.transformer, seed=1))
    _, second = made.fused(made.adapter_for(tiny.transformer, made.LAYERS[:5], rank=2, seed=2))
    by_hand = tiny.with_transformer(merged_by_hand(tiny, (first, 0.8), (second, 0.6)), tiny.generation_config)
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
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


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


# --- extract, resize, mix ---------------------------------------------------------------------------------------------


def test_rank_by_energy():
    values = torch.tensor([3.0, 2.0, 1.0, 0.0])
    ranks = [choose_rank(values, 14.0, energy, 9) for energy in (0.0, 9 / 14, 0.65, 13 / 14, 0.93, 1.0)]
    assert ranks == [1, 1, 2, 2, 3, 3]
    assert choose_rank(values, 14.0, 1.0, 2) == 2
    assert choose_rank(torch.zeros(3), 0.0, 0.9, 3) == 1


def test_truncation_is_the_best_of_its_rank():
    torch.manual_seed(0)
    matrix = torch.randn(30, 20)
    values = torch.linalg.svdvals(matrix)
    low_rank, kept = truncate(matrix, 1.0, 5)
    assert (matrix - low_rank.delta()).norm().item() == pytest.approx(values[5:].norm().item(), rel=1e-4)
    assert kept.energy / kept.total == pytest.approx((values[:5].norm() / values.norm()).item() ** 2, rel=1e-4)
    whole = LowRank(torch.randn(6, 20), torch.randn(30, 6), 0.7)
    for found in (truncate_low_rank(whole, 1.0, 4)[0], truncate(whole.delta(), 1.0, 4)[0]):
        error = (whole.delta() - found.delta()).norm()
        assert error.item() == pytest.approx(torch.linalg.svdvals(whole.delta())[4:].norm().item(), rel=1e-3)


def test_truncation_of_large_matrices_is_close_to_the_best(monkeypatch):
    """Of matrices with more than 1,024 rows and columns only the leading part is computed."""
    monkeypatch.setattr("fewstep.export.lora_svd._WHOLE", 100)
    torch.manual_seed(0)
    values = 0.9 ** torch.arange(200).float()
    left, right = (torch.linalg.qr(torch.randn(200, 200))[0] for _ in range(2))
    matrix = left * values @ right
    low_rank, kept = truncate(matrix, 0.99, 64)
    needed = int((values.square().cumsum(0) >= 0.99 * values.square().sum()).int().argmax()) + 1
    assert kept.rank == needed
    assert (matrix - low_rank.delta()).norm().item() == pytest.approx(values[needed:].norm().item(), rel=1e-2)


def test_extraction_gives_the_tuned_model_back(tiny, tiny_folder, character, tmp_path):
    succeed("lora", "merge", tiny_folder, character, "--out", tmp_path / "tuned")
    out = tmp_path / "extracted.safetensors"
    more = ("--energy", 1, "--rank", 48, "--dtype", "fp32")
    done = succeed("lora", "extract", tiny_folder, tmp_path / "tuned", "--out", out, *more)
    assert "7 linear layers" in done.stdout
    again = load(tiny_folder, "cpu", loras={str(out): 1.0}).transformer.state_dict()
    tuned = load(tmp_path / "tuned", "cpu").transformer.state_dict()
    torch.testing.assert_close(again, tuned, atol=1e-5, rtol=1e-4)
    small = tmp_path / "small.safetensors"
    done = succeed("lora", "extract", tiny_folder, tmp_path / "tuned", "--out", small, "--energy", 0.5, "--rank", 2)
    assert {len(tensor) for key, tensor in load_file(small).items() if "lora_A" in key} <= {1, 2}
    assert "ranks 1 to 2" in done.stdout


def test_what_no_lora_can_hold_is_named(tiny_folder, tiny, tmp_path):
    changed = merged_by_hand(tiny, (made.deltas(made.adapter_for(tiny.transformer)), 1.0))
    with torch.no_grad():
        changed.x_pad_token += 1
    tiny.with_transformer(changed, tiny.generation_config).save(tmp_path / "tuned")
    done = succeed("lora", "extract", tiny_folder, tmp_path / "tuned", "--out", tmp_path / "a.safetensors")
    assert "not in the LoRA, which has linear layers alone: one other tensor: x_pad_token" in done.stderr


def test_resize(tiny, character, tmp_path):
    out = tmp_path / "small.safetensors"
    done = succeed("lora", "resize", character, "--out", out, "--rank", 2)
    whole = made.deltas(made.adapter_for(tiny.transformer, seed=1))
    small = load_file(out)
    left = total = 0.0
    for layer, delta in whole.items():
        found = small[f"transformer.{layer}.lora_B.weight"] @ small[f"transformer.{layer}.lora_A.weight"]
        best = torch.linalg.svdvals(delta)[2:].norm().item()
        assert (delta - found).norm().item() == pytest.approx(best, rel=1e-2)
        left, total = left + best**2, total + delta.norm().item() ** 2
    assert f"{100 * (1 - left / total):.2f}% of the squared norm" in done.stdout


def test_a_lokr_becomes_a_lora(tiny, tmp_path):
    parts, expected = made.lokr(tiny.transformer)
    file = made.keyed("lycoris_", "layers.1.feed_forward.w2", parts)
    path, out = made.save(tmp_path / "a.safetensors", file), tmp_path / "b.safetensors"
    succeed("lora", "resize", path, "--out", out, "--rank", 48)
    found = load_file(out)
    name = "transformer.layers.1.feed_forward.w2"
    torch.testing.assert_close(found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"], expected)


def test_mixtures(tiny, tiny_folder, character, style, tmp_path):
    """Concatenation is both adapters, exactly; the sum is the best of its rank."""
    out = tmp_path / "both.safetensors"
    succeed("lora", "mix", f"{character}:0.8", f"{style}:0.6", "--out", out, "--dtype", "fp32")
    whole = made.deltas(made.adapter_for(tiny.transformer, seed=1))
    _, second = made.fused(made.adapter_for(tiny.transformer, made.LAYERS[:5], rank=2, seed=2))
    both = load(tiny_folder, "cpu", loras={str(out): 1.0}).transformer.state_dict()
    expected = merged_by_hand(tiny, (whole, 0.8), (second, 0.6)).state_dict()
    torch.testing.assert_close(both, expected, atol=1e-5, rtol=1e-4)
    with safe_open(out, "pt") as tensors:
        assert tensors.metadata()["modelspec.merged_from"] == "character:0.8, style:0.6"
    small = tmp_path / "small.safetensors"
    succeed("lora", "mix", f"{character}:0.8", f"{style}:0.6", "--out", small, "--dtype", "fp32", "--rank", 3)
    layer, found = "layers.0.attention.to_q", load_file(small)
    total = 0.8 * whole[layer] + 0.6 * second[layer]
    delta = found[f"transformer.{layer}.lora_B.weight"] @ found[f"transformer.{layer}.lora_A.weight"]
    assert (total - delta).norm().item() == pytest.approx(torch.linalg.svdvals(total)[3:].norm().item(), rel=1e-3)


def test_python_errors_are_user_errors(tiny_folder, character):
    with pytest.raises(UserError, match="the strength nan is no finite number"):
        fewstep.load(tiny_folder, "cpu", loras={str(character): float("nan")})
    with pytest.raises(UserError, match=r"--ignore nothing: no key of .*character.* matches it"):
        fewstep.load(tiny_folder, "cpu", loras={str(character): 1.0}, ignore=["nothing"])
