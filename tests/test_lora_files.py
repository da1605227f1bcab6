"""LoRA files of other programs: every format adds what its program adds, and nothing is dropped without a word."""

import json

import lora_files as made
import pytest
import torch
from lora_files import assert_close, found_deltas
from safetensors.torch import load_file

from fewstep.errors import UserError
from fewstep.models.lora.bind import read_lora
from fewstep.models.lora.targets import released_targets, targets_of
from fewstep.models.lora.write import write_lora
from fewstep.models.zimage.family import ZIMAGE


@pytest.fixture(scope="module")
def targets(tiny):
    return targets_of(tiny.transformer, ZIMAGE)


@pytest.fixture(scope="module")
def adapter(tiny):
    return made.adapter_for(tiny.transformer)


PLAIN = {
    "diffusers": (made.diffusers, False),
    "stray prefix": (lambda a: made.diffusers(a, "transformer.base_model.model."), False),
    "peft": (lambda a: made.diffusers(a, "base_model.model."), False),
    "without prefix": (lambda a: made.diffusers(a, ""), False),
    "peft in memory": (made.peft_named, False),
    "ai-toolkit": (made.ai_toolkit, False),
    "ai-toolkit with alphas": (made.with_alphas, True),
    "kohya": (made.kohya, True),
    "dots": (made.dotted, False),
}


@pytest.mark.parametrize("name", PLAIN)
def test_formats_of_separate_layers(tiny, targets, adapter, tmp_path, name):
    write, scaled = PLAIN[name]
    lora = read_lora(made.save(tmp_path / "a.safetensors", write(adapter)), targets)
    assert_close(found_deltas(tiny, lora), made.deltas(adapter, scaled))
    assert (lora.modules, lora.ranks) == (len(adapter), [3, 4])


@pytest.mark.parametrize(
    ("prefix", "down", "up", "flat"),
    [
        ("diffusion_model.", "lora_A.weight", "lora_B.weight", False),
        ("model.diffusion_model.", "lora_down.weight", "lora_up.weight", False),
        ("lora_unet_", "lora_down.weight", "lora_up.weight", True),
        ("lycoris_", "lora_down.weight", "lora_up.weight", True),
    ],
)
def test_fused_queries_keys_and_values(tiny, targets, adapter, tmp_path, prefix, down, up, flat):
    file, expected = made.fused(adapter, prefix, down, up, flat)
    lora = read_lora(made.save(tmp_path / "a.safetensors", file), targets)
    assert_close(found_deltas(tiny, lora), expected)
    assert (lora.modules, len(lora.updates)) == (5, 9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-6)])
def test_dtypes(tiny, targets, adapter, tmp_path, dtype, tolerance):
    lora = read_lora(made.save(tmp_path / "a.safetensors", made.kohya(adapter), dtype=dtype), targets)
    assert_close(found_deltas(tiny, lora), made.deltas(adapter), atol=tolerance, rtol=tolerance)
    assert lora.dtype == dtype


def test_layers_outside_of_blocks_have_their_names_in_every_format(tiny, targets, tmp_path):
    layers = ("all_x_embedder.2-1", "all_final_layer.2-1.linear", "t_embedder.mlp.0", "cap_embedder.1")
    adapter = made.adapter_for(tiny.transformer, (*layers, "layers.1.adaLN_modulation.0"))
    for prefix in ("transformer.", "diffusion_model."):
        lora = read_lora(made.save(tmp_path / "a.safetensors", made.diffusers(adapter, prefix)), targets)
        assert_close(found_deltas(tiny, lora), made.deltas(adapter, scaled=False))
    released = {key.replace("all_", "").replace(".2-1", ""): value for key, value in made.ai_toolkit(adapter).items()}
    assert "diffusion_model.final_layer.linear.lora_A.weight" in released
    lora = read_lora(made.save(tmp_path / "a.safetensors", released), targets)
    assert_close(found_deltas(tiny, lora), made.deltas(adapter, scaled=False))


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 3, "lora_alpha": 6}, {3: 2.0, 4: 2.0}),
        ({"r": 4, "lora_alpha": 2, "use_rslora": True}, {3: 1.0, 4: 1.0}),
        (
            {"r": 3, "lora_alpha": 6, "rank_pattern": {"w1": 4}, "alpha_pattern": {"feed_forward.w1": 1}},
            {3: 2.0, 4: 0.25},
        ),
    ],
)
def test_alphas_in_configurations(tiny, targets, adapter, tmp_path, config, scale):
    """Of a peft folder, and of the header that diffusers writes."""
    expected = {layer: scale[len(down)] * up @ down for layer, (down, up, _) in adapter.items()}
    folder = made.save_peft_folder(tmp_path / "peft", adapter, config | {"base_model_name_or_path": "me/Z-Image"})
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    file = made.save(tmp_path / "a.safetensors", made.diffusers(adapter), header)
    for path in (folder, folder / "adapter_model.safetensors", file):
        assert_close(found_deltas(tiny, read_lora(path, targets)), expected)
    assert read_lora(folder, targets).metadata["base_model_name_or_path"] == "me/Z-Image"


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_", "transformer."])
@pytest.mark.parametrize("rank", [None, 3])
def test_lokr(tiny, targets, tmp_path, prefix, rank):
    """Without a rank, LyCORIS ignores alpha."""
    layer = "layers.1.feed_forward.w2"
    parts, expected = made.lokr(tiny.transformer, layer, rank=rank)
    lora = read_lora(made.save(tmp_path / "a.safetensors", made.keyed(prefix, layer, parts)), targets)
    assert_close(found_deltas(tiny, lora), {layer: expected})


@pytest.mark.parametrize("factor", [3, 4])
def test_lokr_of_a_fused_layer(tiny, targets, tmp_path, factor):
    """Its rows are those of queries, keys and values, whether or not the left factor can be divided by three."""
    out, inner = 3 * 48, 48
    w1, w2 = torch.randn(factor, 4), torch.randn(out // factor, inner // 4)
    file = made.keyed("diffusion_model.", "layers.0.attention.qkv", {"lokr_w1": w1, "lokr_w2": w2})
    lora = read_lora(made.save(tmp_path / "a.safetensors", file), targets)
    rows = torch.kron(w1, w2).chunk(3)
    expected = {f"layers.0.attention.to_{letter}": part for letter, part in zip("qkv", rows, strict=True)}
    assert_close(found_deltas(tiny, lora), expected)
    write_lora(tmp_path / "b.safetensors", lora.updates, targets, "comfyui", {})  # back as it was
    again = load_file(tmp_path / "b.safetensors")
    torch.testing.assert_close({key: again[key] for key in file}, file)


def normalized(weight, magnitude, axis):
    return weight * magnitude / weight.norm(dim=axis, keepdim=True)


@pytest.mark.parametrize(
    ("ending", "axis"),
    [("dora_scale", 1), ("dora_scale", 0), ("lora_magnitude_vector", 1), ("lora_magnitude_vector.weight", 1)],
)
def test_dora(tiny, targets, tmp_path, ending, axis):
    """LyCORIS has norms of rows or of columns, peft of rows."""
    layer = "layers.1.feed_forward.w2"
    adapter = made.adapter_for(tiny.transformer, (layer,))
    weight = tiny.transformer.get_submodule(layer).weight
    magnitude = torch.rand(weight.shape[0], 1) if axis else torch.rand(1, weight.shape[1])
    stored = magnitude if ending == "dora_scale" else magnitude.flatten()
    file = made.diffusers(adapter) | {f"transformer.{layer}.{ending}": stored}
    lora = read_lora(made.save(tmp_path / "a.safetensors", file), targets)
    changed = weight + made.deltas(adapter, scaled=False)[layer]
    assert_close(found_deltas(tiny, lora), {layer: normalized(changed, magnitude, axis) - weight})


def test_dora_of_a_fused_layer(tiny, targets, adapter, tmp_path):
    name, (down, up, _) = "diffusion_model.layers.0.attention.qkv", adapter["layers.0.attention.to_q"]
    file = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": torch.cat([up, 2 * up, 3 * up])}
    rows = torch.rand(3 * len(up), 1)
    lora = read_lora(made.save(tmp_path / "a.safetensors", file | {f"{name}.dora_scale": rows}), targets)
    expected = {}
    for index, letter in enumerate("qkv"):
        weight = tiny.transformer.get_submodule(f"layers.0.attention.to_{letter}").weight
        changed = normalized(weight + (index + 1) * up @ down, rows.chunk(3)[index], 1)
        expected[f"layers.0.attention.to_{letter}"] = changed - weight
    assert_close(found_deltas(tiny, lora), expected)
    columns = made.save(tmp_path / "b.safetensors", file | {f"{name}.dora_scale": torch.rand(1, down.shape[1])})
    with pytest.raises(UserError, match=r"qkv\.dora_scale scales columns of a fused layer"):
        read_lora(columns, targets)


def test_names_are_known_without_a_model(targets, adapter, tmp_path):
    lora = read_lora(made.save(tmp_path / "a.safetensors", made.kohya(adapter)), released_targets(ZIMAGE))
    assert lora.updates.keys() == adapter.keys()
