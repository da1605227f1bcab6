"""A file or folder that is not what was asked for: the message says what it seems to be, before what it lacks."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_components import FILES
from test_single_file import as_released
from tiny_checkpoints import save_clip
from torch import Tensor
from transformers import CLIPVisionModelWithProjection, Dinov2Model
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.config.load import find_recipe
from fewstep.data.prompt_shards import PromptShards, write_prompt_index
from fewstep.data.trajectories import Index, read_index, write_index
from fewstep.errors import UserError
from fewstep.models.checkpoints import load_checkpoint
from fewstep.models.components import resolve_model
from fewstep.models.pipeline import TextToImagePipeline, load


def named(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(2, 2) for name in names}


#: Names as published files have them -> what the message says.
FOREIGN: Mapping[str, tuple[dict[str, Tensor], str]] = {
    "diffusers LoRA": (named("transformer.layers.0.attention.to_q.lora_A.weight"), "LoRA adapter"),
    "ComfyUI LoRA": (named("diffusion_model.layers.0.attention.qkv.lora_down.weight"), "LoRA adapter"),
    "LoKr": (named("lycoris_layers_0_attention_qkv.lokr_w1"), "LoRA adapter"),
    "VAE": (named("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.mid_block.x.weight"), "VAE"),
    "SDXL": (named("model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.middle_block.0.x"), "U-Net"),
    "Qwen-Image": (named("transformer_blocks.0.img_mod.1.weight", "img_in.weight"), "a Qwen-Image transformer"),
    "text encoder": (named("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"), "text encoder"),
    "bitsandbytes": (named("layers.0.attention.to_q.weight", "layers.0.attention.to_q.weight.absmax"), "bitsandbytes"),
    "GPTQ": (named("layers.0.attention.to_q.qweight"), "quantized (GPTQ or AWQ)"),
}


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


def one_line(error: BaseException, *words: str) -> None:
    assert isinstance(error, UserError)
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_weights_in_a_folder(folder: Path, kind: str) -> None:
    tensors, words = FOREIGN[kind]
    file = folder / "transformer" / FILES["transformer"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError) as error:
        load(folder)
    one_line(error.value, str(file.parent), words)
    assert "missing" not in str(error.value)


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("with_components", [True, False])
def test_foreign_single_files(tmp_path: Path, tiny_folder: Path, kind: str, with_components: bool) -> None:
    tensors, expected = FOREIGN[kind]
    save_file(tensors, tmp_path / "one.safetensors")
    words = ["convert", str(tmp_path / "one.safetensors"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words + ["--components-from", str(tiny_folder)] * with_components)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "one.safetensors" in done.stderr
    assert expected in done.stderr
    with pytest.raises(UserError, match=r"one.safetensors: ") as error:
        resolve_model(tmp_path / "one.safetensors")
    one_line(error.value, expected)


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net."])
def test_an_unknown_prefix_is_named(folder: Path, tmp_path: Path, prefix: str) -> None:
    for part in ("transformer", "vae"):
        file = folder / part / FILES[part]
        weights = load_file(file)
        save_file(with_prefix(weights, prefix), file, {"format": "pt"})
        with pytest.raises(UserError) as error:
            load(folder)
        one_line(error.value, str(file), f'the right tensors with "{prefix}" before every name')
        save_file(weights, file, {"format": "pt"})
    released = as_released(load_file(folder / "transformer" / FILES["transformer"]))
    save_file(with_prefix(released, prefix), tmp_path / "one.safetensors")
    words = ["convert", str(tmp_path / "one.safetensors"), "--components-from", str(folder)]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert f'with "{prefix}" before every name' in done.stderr


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_names_of_a_single_file_in_a_folder(folder: Path, tmp_path: Path, prefix: str) -> None:
    """The message has the command that converts it, which works."""
    file = folder / "transformer" / FILES["transformer"]
    weights = load_file(file)
    original = shutil.copytree(folder, tmp_path / "original")
    save_file(as_released(weights, prefix), file, {"format": "pt"})
    with pytest.raises(UserError) as error:
        load(folder)
    one_line(error.value, "seems to have the tensor names of a single file")
    command = str(error.value).partition("use fewstep ")[2].split()
    where = {"MODEL": str(original), "FOLDER": str(tmp_path / "converted")}
    assert CliRunner().invoke(app, [where.get(word, word) for word in command]).exit_code == 0
    found = load(tmp_path / "converted").transformer.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_weights_of_another_component(folder: Path, part: str) -> None:
    other = {"transformer": "vae", "text_encoder": "transformer", "vae": "text_encoder"}[part]
    kind = {"vae": "a VAE", "transformer": "a Z-Image or Lumina transformer", "text_encoder": "text encoder"}[other]
    shutil.copyfile(folder / other / FILES[other], folder / part / FILES[part])
    with pytest.raises(UserError) as error:
        load(folder)
    one_line(error.value, f"{folder / part}", f"seems to be {kind}" if other != "text_encoder" else kind)


def test_folders_that_are_no_models(tmp_path: Path, tiny_folder: Path) -> None:
    run = tmp_path / "runs" / "mine"
    shutil.copytree(tiny_folder, run / "student")
    (run / "lora").mkdir()
    save_file(FOREIGN["diffusers LoRA"][0], run / "lora" / "pytorch_lora_weights.safetensors")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_text("kind: distill")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text(json.dumps({"architectures": ["CLIPModel"]}))
    (tmp_path / "several" / "a").mkdir(parents=True)
    (tmp_path / "several" / "a" / "model_index.json").write_text("{}")
    (tmp_path / "download").mkdir()
    save_file(named("layers.0.x"), tmp_path / "download" / "z image.safetensors")
    for folder, message in (
        (run, f"the folder of a run; its model is {run / 'student'}"),
        (run / "lora", f"a LoRA adapter, which is no whole model; the merged student is {run / 'student'}"),
        (run / "student" / "transformer", f"one component of a model; the model is {run / 'student'}"),
        (tmp_path / "begun", "the folder of a run that is not finished"),
        (tmp_path / "adapter", "a LoRA adapter, which is no whole model; give it with --lora"),
        (tmp_path / "clip", "one component (CLIPModel), no whole model"),
        (tmp_path / "several", "a folder of models; name one of them: a"),
        (tmp_path / "download", f"fewstep convert '{tmp_path / 'download' / 'z image.safetensors'}' --components-from"),
        (tmp_path / "begun" / "recipe.yaml", "a recipe, not a model"),
    ):
        with pytest.raises(UserError) as error:
            resolve_model(folder)
        one_line(error.value, str(folder), message)


def test_recipes_prompts_and_trajectories_taken_for_each_other(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("kind: distill")
    with pytest.raises(UserError, match=r"run: a folder, not a recipe; the recipe of this run is .*run/recipe.yaml"):
        find_recipe(tmp_path / "run")
    with pytest.raises(UserError, match=r"a folder, not a recipe$"):
        find_recipe(tmp_path)
    write_prompt_index(tmp_path / "prompts", {}, [1], {})
    with pytest.raises(UserError, match=r"prompts: encoded prompts, not trajectories; name it in prompts.source"):
        read_index(tmp_path / "prompts")
    write_index(tmp_path / "cache", Index({}, samples=2, shard_size=1, first_seed=0))
    with pytest.raises(UserError, match=r"cache: trajectories, not prompts; name it in trajectory.cache"):
        PromptShards(tmp_path / "cache")


def test_an_evaluation_network_of_another_kind(tmp_path: Path, tiny: TextToImagePipeline) -> None:
    folder = save_clip(tmp_path / "clip")
    load_checkpoint(CLIPVisionModelWithProjection, str(folder))
    save_file(FOREIGN["diffusers LoRA"][0], folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"clip: seems to be a LoRA adapter, .*WithProjection is needed"):
        load_checkpoint(CLIPVisionModelWithProjection, str(folder))
    with pytest.raises(UserError, match=r"clip: .*Dinov2Model"):
        load_checkpoint(Dinov2Model, str(save_clip(tmp_path / "other" / "clip")))
