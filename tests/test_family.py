"""A second model family: what holds for Z-Image holds for it, without a line about it outside of its own file."""

import ast
import copy
from pathlib import Path

import pytest
import torch
from fake_family import FAKE, FakeBlock, FakeTransformer, fake_pipeline
from safetensors.torch import load_file
from torch import nn

import fewstep
from fewstep.core.registry import model_families
from fewstep.errors import UserError
from fewstep.export.single_file import write_transformer
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.adapter_files import adapter_state_dict, write_merged
from fewstep.models.adapters import AdapterDenoiser, adapter_parameters, add_adapter
from fewstep.models.components import load_component
from fewstep.models.family import get_family, resolve_family
from fewstep.models.meta_pipeline import meta_pipeline
from fewstep.models.noise import initial_noise
from fewstep.models.offload import offload_blocks
from fewstep.models.partial_models import load_prompt_encoder, with_components_from
from fewstep.models.pipeline import load
from fewstep.models.quantize import FP8, Fp8Linear
from fewstep.models.single_file import read_transformer
from fewstep.plan.communication import ParamCounts

model_families.register("FakeVideoPipeline", "fake_family:FAKE")

PROMPTS = ["a fox", "一只狐狸"]


@pytest.fixture
def model():
    return fake_pipeline()


@pytest.fixture
def folder(model, tmp_path):
    return model.save(tmp_path / "fake")


def inputs(model):
    torch.manual_seed(1)
    return torch.randn(2, *model.latent_shape(16, 24)), torch.rand(2), model.encode(PROMPTS)


def test_families_are_found_by_the_class_in_the_index(folder, tiny_folder):
    assert resolve_family(folder) is FAKE
    assert resolve_family(tiny_folder).pipeline_class == "ZImagePipeline"
    with pytest.raises(UserError, match=r"'NoPipeline' is not a supported pipeline; supported: .*FakeVideoPipeline"):
        get_family("NoPipeline")


def test_a_saved_folder_is_loaded_back(model, folder):
    back = load(folder)
    assert back.family is FAKE
    assert back.generation_config == model.generation_config
    for name in FAKE.modules:
        torch.testing.assert_close(back.components[name].state_dict(), model.components[name].state_dict())
    assert torch.equal(back.denoiser(*inputs(back)), model.denoiser(*inputs(model)))
    assert load(folder, dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


def test_prompts_and_latents_have_the_familys_shapes(model, folder):
    encoded = model.encode(PROMPTS)
    assert encoded.features.shape == (2, len(PROMPTS[1].encode()) + 2, FAKE.prompt_features(model.components))
    assert encoded.lengths.tolist() == [len(prompt.encode()) + 2 for prompt in PROMPTS]
    assert torch.equal(load_prompt_encoder(folder)(PROMPTS).features, encoded.features)
    assert model.latent_shape(16, 24) == (3, 1, 4, 6)
    assert initial_noise(model, [1, 2], 16, 24).shape == (2, 3, 1, 4, 6)
    with pytest.raises(UserError, match="height 18 is not a multiple of 4"):
        model.latent_shape(18, 24)
    images = torch.rand(2, 3, 4, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(model.decode(model.encode_images(images)), images)


@pytest.mark.parametrize("offload", ["none", "model", "group"])
def test_images_are_generated(folder, offload):
    model = load(folder, offload=offload)
    result = generate(model, PROMPTS, SamplingParams(seed=3))
    assert result.images.shape == (2, 16, 24, 3)
    assert result.nfe == 8  # four steps with guidance
    assert result.images.float().std() > 1
    assert torch.equal(result.images, generate(fake_pipeline(), PROMPTS, SamplingParams(seed=3)).images)
    assert not torch.equal(result.images, generate(model, PROMPTS[::-1], SamplingParams(seed=3)).images)


def test_a_folder_without_generation_config_gets_the_family_s(folder):
    (folder / "fewstep.json").unlink()
    with pytest.warns(UserWarning, match="this is a FakeVideo model: the defaults are 3 steps"):
        assert load(folder).generation_config.steps == 3


def test_blocks_are_checkpointed_offloaded_and_counted(model):
    blocks = model.denoiser.get_blocks()
    assert [type(block) for block in blocks] == [FakeBlock, FakeBlock]
    counts = ParamCounts.of(model.denoiser)
    assert counts.root == counts.parameters - 2 * counts.block
    model.transformer.requires_grad_(True)
    gradients = []
    for enable in (lambda _: None, lambda d: d.enable_gradient_checkpointing(), lambda d: offload_blocks(d, "cpu")):
        enable(model.denoiser)
        model.transformer.zero_grad()
        model.denoiser(*inputs(model)).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.transformer.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


def test_adapters_train_and_are_merged(model, tmp_path):
    for name in ("student", "fake"):
        add_adapter(model.transformer, name, 2, 4.0, target_modules=FAKE.lora_target_modules)
        for parameter in adapter_parameters(model.transformer, name).values():
            nn.init.normal_(parameter)
    student = AdapterDenoiser(model.denoiser, {"student": 1.0})
    loss = student(*inputs(model)).square().mean()
    loss.backward()
    assert len(list(student.parameters())) == 4  # A and B of "inner" in two blocks
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in adapter_parameters(model.transformer, "fake").values())
    adapters = {"student": 0.5, "fake": 1.0}
    expected = AdapterDenoiser(model.denoiser, adapters)(*inputs(model))
    merged = fake_pipeline()
    merged.save(tmp_path / "merged", lambda folder: write_merged(folder, model.transformer, adapters))
    torch.testing.assert_close(load(tmp_path / "merged").denoiser(*inputs(model)), expected)
    FAKE.write_lora(tmp_path / "lora", adapter_state_dict(model.transformer, "student"))
    assert set(load_file(tmp_path / "lora" / "lora.safetensors")) == {
        f"blocks.{block}.inner.lora_{letter}.weight" for block in range(2) for letter in "AB"
    }


def test_the_familys_layers_are_quantized(folder):
    model = load(folder, dtype=FP8)
    quantized = [name for name, module in model.transformer.named_modules() if isinstance(module, Fp8Linear)]
    assert quantized == ["blocks.0.outer", "blocks.1.outer"]


def test_the_familys_single_file_is_written_and_read(model, folder, tmp_path):
    file = write_transformer(model.transformer, tmp_path / "fake.safetensors", FAKE, "flat")
    assert {name for name in load_file(file) if "0.inner" in name} == {"b.0.inner.weight", "b.0.inner.bias"}
    transformer = read_transformer(file, FAKE, model.transformer.config)
    found = with_components_from(transformer, folder)
    assert torch.equal(found.denoiser(*inputs(model)), model.denoiser(*inputs(model)))
    with pytest.raises(UserError, match="FakeVideoPipeline has no single-file layout 'comfyui'; known: flat"):
        write_transformer(model.transformer, tmp_path / "other.safetensors", FAKE, "comfyui")


def test_a_model_without_weights_is_made_from_configurations(model, folder):
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    meta = meta_pipeline(folder, torch.bfloat16)
    shapes = {name: tensor.shape for name, tensor in model.transformer.state_dict().items()}
    assert {name: tensor.shape for name, tensor in meta.transformer.state_dict().items()} == shapes
    assert {(p.device.type, p.dtype) for p in meta.transformer.parameters()} == {("meta", torch.bfloat16)}


def test_a_component_of_another_architecture_is_refused(folder):
    other = FakeTransformer(dim=6)
    other.save_pretrained(folder / "transformer")
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"dim": 6', '"dim": 8'))
    with pytest.raises(UserError, match="transformer: "):
        load_component(folder, "transformer")


def test_copies_of_a_transformer_are_independent(model):
    other = FAKE.denoiser(copy.deepcopy(model.transformer))
    other.enable_gradient_checkpointing()
    assert {block.gradient_checkpointing for block in model.denoiser.get_blocks()} == {False}


#: The emoji plug-in trains a small Z-Image from scratch.
MAY_IMPORT_ZIMAGE = ("models/zimage/", "emoji/")


def test_only_the_family_itself_imports_z_image():
    package = Path(fewstep.__file__).parent
    found = []
    for file in package.rglob("*.py"):
        if file.relative_to(package).as_posix().startswith(MAY_IMPORT_ZIMAGE):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            found += [f"{file}: {name}" for name in names if "zimage" in name or name.startswith("ZImage")]
    assert not found
