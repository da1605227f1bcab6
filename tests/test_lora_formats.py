"""LoRA files and other programs: diffusers and peft read the same, and open what is written."""

import lora_files as made
import pytest
import torch
from diffusers import ZImagePipeline
from lora_files import assert_close, found_deltas
from peft import LoKrConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file

from fewstep.export.diffusers import to_diffusers
from fewstep.models.lora.bind import read_lora
from fewstep.models.lora.formats import FORMATS
from fewstep.models.lora.metadata import lora_metadata
from fewstep.models.lora.targets import targets_of
from fewstep.models.lora.write import write_lora
from fewstep.models.zimage.family import ZIMAGE


@pytest.fixture(scope="module")
def targets(tiny):
    return targets_of(tiny.transformer, ZIMAGE)


@pytest.fixture(scope="module")
def adapter(tiny):
    return made.adapter_for(tiny.transformer)


def by_diffusers(tiny, path):
    """The weights' changes by diffusers' loader."""
    transformer = to_diffusers(tiny.transformer, ZIMAGE)
    state, metadata = ZImagePipeline.lora_state_dict(str(path), return_lora_metadata=True)
    ZImagePipeline.load_lora_into_transformer(state, transformer, adapter_name="one", metadata=metadata)
    layers = {name: part for name, part in transformer.named_modules() if "one" in getattr(part, "scaling", {})}
    changes = {}
    for name, layer in layers.items():
        before = layer.base_layer.weight.clone()
        layer.merge()
        changes[name] = layer.base_layer.weight.detach() - before
        layer.base_layer.weight.data = before
    return changes


BOTH_READ = {
    "diffusers": made.diffusers,
    "ai-toolkit": made.ai_toolkit,
    "ai-toolkit with alphas": made.with_alphas,
    "kohya": made.kohya,
}


@pytest.mark.parametrize("name", BOTH_READ)
def test_diffusers_reads_the_same(tiny, targets, adapter, tmp_path, name):
    file = made.save(tmp_path / "a.safetensors", BOTH_READ[name](adapter))
    assert_close(found_deltas(tiny, read_lora(file, targets)), by_diffusers(tiny, file), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [None, 3])
def test_diffusers_reads_the_same_lokr(tiny, targets, tmp_path, rank):
    parts, _ = made.lokr(tiny.transformer, rank=rank)
    file = made.keyed("diffusion_model.", "layers.1.feed_forward.w2", parts)
    path = made.save(tmp_path / "a.safetensors", file)
    assert_close(found_deltas(tiny, read_lora(path, targets)), by_diffusers(tiny, path), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "ai-toolkit"])
def test_diffusers_reads_what_is_written(tiny, targets, adapter, tmp_path, layout):
    """ComfyUI's fused names are none that diffusers reads with lora_A."""
    lora = read_lora(made.save(tmp_path / "a.safetensors", made.kohya(adapter)), targets)
    write_lora(tmp_path / "b.safetensors", lora.updates, targets, layout, lora_metadata("b"))
    assert_close(by_diffusers(tiny, tmp_path / "b.safetensors"), made.deltas(adapter), atol=1e-5, rtol=1e-4)


def test_diffusers_reads_the_dora_that_is_written(tiny, targets, adapter, tmp_path):
    layer = "layers.1.feed_forward.w2"
    one = {layer: adapter[layer]}
    file = made.kohya(one) | made.keyed("lora_unet_", layer, {"dora_scale": torch.rand(48, 1)})
    lora = read_lora(made.save(tmp_path / "a.safetensors", file), targets)
    write_lora(tmp_path / "b.safetensors", lora.updates, targets, "diffusers", {})
    assert_close(by_diffusers(tiny, tmp_path / "b.safetensors"), found_deltas(tiny, lora), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "w2"], init_lora_weights=False),
        LoraConfig(r=4, lora_alpha=5, target_modules=["to_q"], use_rslora=True, init_lora_weights=False),
        LoraConfig(r=3, lora_alpha=5, target_modules=["to_q"], use_dora=True, init_lora_weights=False),
        LoraConfig(r=3, target_modules=["to_q", "w1"], alpha_pattern={"w1": 7}, init_lora_weights=False),
        LoKrConfig(r=3, alpha=6, target_modules=["w1"], init_weights=False),
        LoKrConfig(r=64, alpha=6, target_modules=["w1"], init_weights=False),
    ],
    ids=["lora", "rslora", "dora", "alpha pattern", "lokr", "whole lokr"],
)
def test_folders_that_peft_writes(tiny, targets, tmp_path, config):
    """Written by peft's own ``save_pretrained``."""
    model = get_peft_model(to_diffusers(tiny.transformer, ZIMAGE), config)
    model.save_pretrained(tmp_path / "peft")
    expected = {}
    for name, layer in model.base_model.model.named_modules():
        if "default" in getattr(layer, "scaling", {}):
            before = layer.base_layer.weight.clone()
            layer.merge()
            expected[name] = layer.base_layer.weight.detach() - before
            layer.base_layer.weight.data = before
    assert_close(found_deltas(tiny, read_lora(tmp_path / "peft", targets)), expected, atol=1e-5, rtol=1e-4)


# --- written files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", FORMATS)
def test_written_files_are_read_as_they_were(tiny, targets, adapter, tmp_path, layout):
    lora = read_lora(made.save(tmp_path / "a.safetensors", made.kohya(adapter)), targets)
    out = tmp_path / ("b" if layout == "peft" else "b.safetensors")
    write_lora(out, lora.updates, targets, layout, lora_metadata("b"))
    again = read_lora(out, targets)
    found = {name: delta for name, delta in found_deltas(tiny, again).items() if delta.any()}
    assert_close(found, made.deltas(adapter))
    assert again.ranks[-2:] == [3, 4]  # the blocks of a fused layer's parts are separated again


def test_written_keys_are_those_of_the_program(targets, adapter, tmp_path):
    lora = read_lora(made.save(tmp_path / "a.safetensors", made.kohya(adapter)), targets)
    expected = {
        "diffusers": made.diffusers(adapter),
        "ai-toolkit": made.ai_toolkit(adapter),
        "kohya": made.kohya(adapter),
        "peft": made.diffusers(adapter, "base_model.model."),
        "comfyui": made.fused(adapter)[0],
    }
    for layout, tensors in expected.items():
        out = tmp_path / layout if layout == "peft" else tmp_path / f"{layout}.safetensors"
        write_lora(out, lora.updates, targets, layout, {})
        file = out / "adapter_model.safetensors" if layout == "peft" else out
        assert load_file(file).keys() == tensors.keys(), layout
    comfyui = load_file(tmp_path / "comfyui.safetensors")
    assert comfyui["diffusion_model.layers.0.attention.qkv.lora_B.weight"].shape == (144, 9)  # three blocks of rank 3


def test_fused_files_keep_their_rank(targets, adapter, tmp_path):
    """A file with one ``down`` for queries, keys and values is written as it was."""
    file, _ = made.fused({layer: adapter[layer] for layer in made.LAYERS[:4]})
    lora = read_lora(made.save(tmp_path / "a.safetensors", file), targets)
    write_lora(tmp_path / "b.safetensors", lora.updates, targets, "comfyui", {})
    torch.testing.assert_close(load_file(tmp_path / "b.safetensors"), file)


def test_peft_opens_the_folder_that_is_written(tiny, targets, adapter, tmp_path):
    lora = read_lora(made.save(tmp_path / "a.safetensors", made.kohya(adapter)), targets)
    write_lora(tmp_path / "peft", lora.updates, targets, "peft", lora_metadata("b", base_model="me/mine"))
    model = PeftModel.from_pretrained(to_diffusers(tiny.transformer, ZIMAGE), str(tmp_path / "peft"))
    found = {
        name: layer.get_delta_weight("default").detach()
        for name, layer in model.base_model.model.named_modules()
        if "default" in getattr(layer, "scaling", {})
    }
    assert_close(found, made.deltas(adapter))


def test_layers_of_a_peft_model_have_their_own_names(tiny):
    transformer = to_diffusers(tiny.transformer, ZIMAGE)
    names = targets_of(transformer, ZIMAGE).shapes
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), transformer, "one")
    assert targets_of(transformer, ZIMAGE).shapes == names
