"""Lumina 2 passes the tests of every family; its template, null prompt and configuration."""

import pytest
import torch
from diffusers import Lumina2Pipeline
from family_conformance import FamilyConformance, load_tiny
from lumina2_setup import save_lumina2
from safetensors.torch import load_file, save_file

from fewstep.errors import UserError
from fewstep.models.lora.bind import read_lora
from fewstep.models.lora.metadata import lora_metadata
from fewstep.models.lora.targets import targets_of
from fewstep.models.lora.write import write_lora
from fewstep.models.lumina2.prompts import SYSTEM_PROMPT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_lumina2(tmp_path_factory.mktemp("models") / "lumina2")


@pytest.fixture(scope="module")
def pipeline_class():
    return Lumina2Pipeline


class TestLumina2(FamilyConformance):
    call_options = {"cfg_normalization": False}  # noqa: RUF012

    def diffusers_velocity(self, pipeline, x, sigma, prompts):
        features, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        return -pipeline.transformer(x, 1 - sigma, features, mask, return_dict=False)[0]


def test_the_template_has_a_system_prompt_and_the_null_prompt_has_none(folder):
    encoder = load_tiny(folder).encoder
    assert Lumina2Pipeline.from_pretrained(folder).system_prompt == SYSTEM_PROMPT
    assert encoder.template("a fox") == encoder.template("a fox", system="") == f"{SYSTEM_PROMPT} <Prompt Start> a fox"
    assert encoder.template("a fox", system="Draw.") == "Draw. <Prompt Start> a fox"
    assert encoder([""]).lengths.tolist() == [1]  # <bos>
    with pytest.raises(UserError, match="have no such part"):
        encoder(["a fox"], assistant_prefix="It is red.")
    with pytest.raises(UserError, match="at most 256 fit"):
        encoder(["a" * 256])


@pytest.mark.parametrize("shared", [True, False], ids=["one lora_A", "block-diagonal"])
def test_adapters_with_the_original_names_are_split_into_parts_of_their_sizes(folder, tmp_path, shared):
    """Queries have 48 rows, keys and values 24."""
    model = load_tiny(folder)
    targets = targets_of(model.transformer, model.family)
    down, up = torch.randn(3, 48), torch.randn(96, 3)
    if not shared:
        up = torch.block_diag(torch.randn(48, 1), torch.randn(24, 1), torch.randn(24, 1))
    name = "diffusion_model.layers.1.attention.qkv"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors", targets)
    found = {layer.rpartition(".")[2]: update.change.delta() for layer, update in lora.updates.items()}
    whole = up @ down
    assert found.keys() == {"to_q", "to_k", "to_v"}
    for part, rows in (("to_q", whole[:48]), ("to_k", whole[48:72]), ("to_v", whole[72:])):
        torch.testing.assert_close(found[part], rows)
    write_lora(tmp_path / "b.safetensors", lora.updates, targets, "comfyui", lora_metadata("b"))
    again = read_lora(tmp_path / "b.safetensors", targets)
    assert list(load_file(tmp_path / "b.safetensors")) == [
        f"{name}.{end}" for end in ("alpha", "lora_A.weight", "lora_B.weight")
    ]
    for layer, update in again.updates.items():
        torch.testing.assert_close(update.change.delta(), lora.updates[layer].change.delta())
    one = {layer: update for layer, update in lora.updates.items() if layer.endswith("to_k")}
    write_lora(tmp_path / "c.safetensors", one, targets, "comfyui", lora_metadata("c"))
    alone = read_lora(tmp_path / "c.safetensors", targets).updates
    torch.testing.assert_close(next(u for n, u in alone.items() if n.endswith("to_k")).change.delta(), whole[48:72])
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up[:95]}, tmp_path / "d.safetensors")
    with pytest.raises(UserError, match="changes a matrix of 95 x 48, but layers"):
        read_lora(tmp_path / "d.safetensors", targets)


def test_attention_backends_are_refused(folder):
    with pytest.raises(UserError, match="Lumina2Pipeline has PyTorch's alone"):
        load_tiny(folder).set_attention_backend("native")


def test_the_default_is_that_of_the_released_model(folder):
    config = load_tiny(folder).generation_config
    assert (config.steps, config.guidance_scale) == (50, 3.0)


def test_another_patch_size_is_refused(folder):
    transformer = load_tiny(folder).transformer
    transformer.register_to_config(patch_size=4)
    with torch.no_grad():
        found = list(load_tiny(folder).family.mismatches({**load_tiny(folder).components, "transformer": transformer}))
    assert found == [("transformer", "patch_size 4 is not supported; only 2 is")]
