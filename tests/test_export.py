"""Whole models for ComfyUI and stable-diffusion.cpp: names, formats, errors, and the way back."""

import json

import gguf
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.core.flow import get_sigmas
from fewstep.errors import UserError
from fewstep.export.comfyui import WorkflowFiles, comfyui_workflow
from fewstep.export.whole_model import export_model
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.generation_config import GenerationConfig
from fewstep.models.pipeline import load
from fewstep.models.single_file import read_transformer

PREFIX = "model.diffusion_model."


def run(*words):
    done = CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "250"})
    assert done.exit_code == 0, done.output
    return done


def read_back(pipeline, file):
    """The model with the transformer of an exported file."""
    transformer = read_transformer(file, pipeline.family, pipeline.transformer.config)
    return pipeline.with_transformer(transformer, pipeline.generation_config)


def images(pipeline):
    return generate(pipeline, ["a noto emoji of a fox on a blue background"], SamplingParams(seed=3)).images.float()


@pytest.fixture(scope="module")
def micro():
    return load("micro-turbo", "cpu")


@pytest.fixture(scope="module")
def drawn(micro):
    return images(micro)


def test_bf16_for_comfyui(tmp_path, tiny_folder, tiny):
    """The transformer as diffusers' own converter reads it, the text encoder as transformers' language model does."""
    export = export_model(tiny_folder, "comfyui", tmp_path / "fox")
    files = [each.file for each in export.components]
    assert files == [
        "diffusion_models/fox-bf16.safetensors",
        "text_encoders/fox-text_encoder-bf16.safetensors",
        "vae/fox-vae-bf16.safetensors",
    ]
    transformer, text, vae = (load_file(export.folder / file) for file in files)
    assert {tensor.dtype for tensor in transformer.values()} == {torch.bfloat16}
    assert all(name.startswith(PREFIX) for name in transformer)
    found = convert_z_image_transformer_checkpoint_to_diffusers(transformer)
    for name, tensor in tiny.transformer.state_dict().items():
        assert torch.equal(found[name], tensor.bfloat16()), name
    with torch.device("meta"):
        language_model = Qwen3ForCausalLM(Qwen3Config(**tiny.text_encoder.config.to_dict()))
    assert set(text) == {name for name in language_model.state_dict() if name != "lm_head.weight"}
    assert set(vae) == set(tiny.vae.state_dict())
    assert [each.relative_rms for each in export.components] == [0, 0, 0]


def test_fp8_for_comfyui_round_trip(tmp_path, micro, drawn):
    """e4m3 with one scale for each matrix of the blocks; errors are those of 3 bits of mantissa; images are close."""
    done = run("export", "micro-turbo", "--to", "comfyui", "--quantize", "fp8", "--out", tmp_path / "fox")
    file = tmp_path / "fox/diffusion_models/fox-fp8.safetensors"
    tensors = load_file(file)
    stem = f"{PREFIX}layers.0.attention.qkv"
    assert tensors[f"{stem}.weight"].dtype == torch.float8_e4m3fn
    assert tensors[f"{stem}.weight_scale"].shape == ()
    assert json.loads(bytes(tensors[f"{stem}.comfy_quant"].tolist())) == {"format": "float8_e4m3fn"}
    assert tensors[f"{PREFIX}x_embedder.weight"].dtype == torch.bfloat16
    report = json.loads((tmp_path / "fox/export.json").read_text())
    transformer, text, vae = report["components"]
    # a uniform mantissa of 3 bits has a relative RMS error of about 2^-4 / sqrt(3) / 1.4 = 2.6%
    assert 0.02 < transformer["formats"]["fp8"]["relative_rms"] < 0.035
    assert 0.02 < text["formats"]["fp8"]["relative_rms"] < 0.035
    assert vae["relative_rms"] == transformer["formats"]["bf16"]["relative_rms"] == 0
    assert transformer["file"] in done.stdout
    assert f"{transformer['relative_rms']:.2%}" in done.stdout
    assert 0 < (images(read_back(micro, file)) - drawn).abs().mean() < 3


def test_q4_k_round_trip(tmp_path, micro, drawn):
    """Read back, the image is the model's up to what 4 bits lose. The reported error is that of the file, measured by
    gguf's reader without the exporter."""
    export = export_model("micro-turbo", "gguf", tmp_path / "fox", "q4_k")
    transformer, text, _ = export.components
    weights = micro.transformer.state_dict()
    reference = {
        "layers.0.feed_forward.w2.weight": weights["layers.0.feed_forward.w2.weight"],
        "layers.0.attention.qkv.weight": torch.cat([weights[f"layers.0.attention.to_{part}.weight"] for part in "qkv"]),
    }
    reader = gguf.GGUFReader(export.folder / transformer.file)
    read = {tensor.name: tensor for tensor in reader.tensors}
    reported = {each.name: each for each in transformer.tensors}
    for name, kind, limit in (("feed_forward.w2", "Q4_K", 0.09), ("attention.qkv", "Q8_0", 0.008)):
        name = f"layers.0.{name}.weight"
        assert read[name].tensor_type.name == kind
        found = torch.from_numpy(gguf.dequantize(read[name].data, read[name].tensor_type).copy())
        bf16 = reference[name].bfloat16().float()
        error = float((found - bf16).norm() / bf16.norm())
        assert reported[name].relative_rms == pytest.approx(error, rel=1e-4)
        assert 0 < error < limit
    assert sum(each.bytes for each in transformer.tensors) == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert read["layers.0.attention.q_norm.weight"].tensor_type.name == "F32"
    assert text.formats.keys() == {"bf16", "q8_0", "f32", "q4_k"}
    assert 0 < (images(read_back(micro, export.folder / transformer.file)) - drawn).abs().mean() < 4


def test_bf16_in_gguf_is_exact(tmp_path, tiny_folder, tiny):
    export = export_model(tiny_folder, "gguf", tmp_path / "fox")
    found = read_back(tiny, export.folder / export.components[0].file).transformer.state_dict()
    for name, tensor in tiny.transformer.state_dict().items():
        assert torch.equal(found[name], tensor.bfloat16().float()), name
    assert export.components[0].formats.keys() == {"bf16", "f32"}


def test_metadata_and_text_encoder_of_gguf(tmp_path, tiny_folder):
    """What ComfyUI-GGUF recognizes, and llama.cpp's names."""
    export = export_model(tiny_folder, "gguf", tmp_path / "fox", "q8_0")
    transformer, text, vae = export.components
    assert vae.file.endswith(".safetensors")
    names = {}
    for each, architecture in ((transformer, "lumina2"), (text, "qwen3")):
        reader = gguf.GGUFReader(export.folder / each.file)
        field = reader.get_field("general.architecture")
        assert bytes(field.parts[field.data[0]]).decode() == architecture
        names[each.component] = {tensor.name for tensor in reader.tensors}
    assert {"cap_embedder.1.weight", "context_refiner.0.attention.qkv.weight"} <= names["transformer"]
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 3)
    with torch.device("meta"):
        config = json.loads((tiny_folder / "text_encoder" / "config.json").read_text())
        language_model = Qwen3ForCausalLM(Qwen3Config(**config))
    expected = {
        mapping.get_name(name, try_suffixes=(".weight",))
        for name in language_model.state_dict()
        if "lm_head" not in name
    }
    assert names["text_encoder"] == expected


def test_workflow_samples_as_the_student():
    """Its own sigmas, N steps, no guidance; every link leads to a node."""
    sigmas = [1.0, 0.9, 0.75, 0.5, 0.0]
    config = GenerationConfig(steps=4, sigmas=sigmas, width=768, height=512)
    files = WorkflowFiles("fox.gguf", "text.gguf", "vae.safetensors", gguf=True)
    workflow = comfyui_workflow(files, config, sigmas, 3.0, "lumina2")
    nodes = {node["class_type"]: node["inputs"] for node in workflow.values()}
    assert nodes["ManualSigmas"] == {"sigmas": "1.000000, 0.900000, 0.750000, 0.500000, 0.000000"}
    assert nodes["SamplerCustom"]["cfg"] == 1
    assert nodes["ModelSamplingAuraFlow"]["shift"] == 3
    assert nodes["KSamplerSelect"] == {"sampler_name": "euler"}
    assert nodes["UnetLoaderGGUF"] == {"unet_name": "fox.gguf"}
    assert nodes["CLIPLoaderGGUF"] == {"clip_name": "text.gguf", "type": "lumina2"}
    assert nodes["EmptySD3LatentImage"] == {"width": 768, "height": 512, "batch_size": 1}
    links = [value for inputs in nodes.values() for value in inputs.values() if isinstance(value, list)]
    assert len(links) == 11
    assert all(workflow[number] and index == 0 for number, index in links)


def test_workflow_of_a_guided_teacher(tmp_path, tiny_folder):
    export_model(tiny_folder, "comfyui", tmp_path / "fox")
    workflow = json.loads((tmp_path / "fox/workflow.json").read_text())
    nodes = {node["class_type"]: node["inputs"] for node in workflow.values()}
    assert nodes["UNETLoader"] == {"unet_name": "fox-bf16.safetensors", "weight_dtype": "default"}
    assert nodes["SamplerCustom"]["cfg"] == 3
    found = [float(word) for word in nodes["ManualSigmas"]["sigmas"].split(", ")]
    assert found == pytest.approx(get_sigmas(6, 3.0), abs=1e-6)


def test_command_of_stable_diffusion_cpp(tmp_path, tiny_folder):
    done = run("export", tiny_folder, "--to", "sd.cpp", "--quantize", "q8_0", "--out", tmp_path / "a fox")
    command = json.loads((tmp_path / "a fox/export.json").read_text())["command"]
    assert f"'{tmp_path}/a fox/diffusion_models/a fox-q8_0.gguf'" in command
    assert "--cfg-scale 3 --steps 6 --sampling-method euler --sigmas 1.000000," in command
    assert f"{command} -p PROMPT" in done.stdout
    assert not (tmp_path / "a fox/workflow.json").exists()


def test_other_samplers_are_refused(tmp_path, tiny):
    """ "lcm" draws all noise anew: it has no share of it."""
    config = tiny.generation_config.model_copy(update={"sampler": "sde", "eta": 0.5})
    folder = tiny.with_transformer(tiny.transformer, config).save(tmp_path / "model")
    with pytest.raises(UserError, match=r"its sampler is sde with eta 0.5, which comfyui does not have"):
        export_model(folder, "comfyui", tmp_path / "fox")


def test_a_system_prompt_is_warned_about(tmp_path, tiny):
    config = tiny.generation_config.model_copy(update={"system_prompt": "You draw."})
    folder = tiny.with_transformer(tiny.transformer, config).save(tmp_path / "model")
    with pytest.warns(UserWarning, match="has a system prompt, which comfyui does not add"):
        export_model(folder, "comfyui", tmp_path / "fox")
