"""Single files of Stable Diffusion 3, Lumina-Image-2.0, FLUX.2 and Wan 2.1, against diffusers' own converters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.loaders import single_file_utils
from flux2_setup import save_flux2
from lumina2_setup import save_lumina2
from safetensors.torch import load_file, save_file
from sd3_setup import save_sd3
from torch import Tensor
from typer.testing import CliRunner
from wan_setup import save_wan

from fewstep.cli.main import app
from fewstep.errors import UserError
from fewstep.export.single_file import write_transformer
from fewstep.models.family import resolve_family
from fewstep.models.pipeline import load
from fewstep.models.single_file import read_transformer

QUERIES, KEYS = 48, 24  # rows of a tiny Lumina 2

Weights = dict[str, Tensor]


@pytest.fixture(scope="module", params=["sd3", "lumina2", "flux2", "wan"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = {"sd3": save_sd3, "lumina2": save_lumina2, "flux2": save_flux2, "wan": save_wan}[request.param]
    return save(tmp_path_factory.mktemp(request.param))


@pytest.fixture
def weights(folder: Path) -> Weights:
    return dict(load(folder).transformer.state_dict())


def converted(file: Weights, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Weights:
    """By diffusers' names, by diffusers' converter; that of Lumina 2 has the released model's sizes in it, and fails on
    a prefix."""
    file = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in file.items()}
    if resolve_family(folder).pipeline_class == "StableDiffusion3Pipeline":
        return single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(file)
    if resolve_family(folder).pipeline_class == "Flux2KleinPipeline":
        return single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(file)
    if resolve_family(folder).pipeline_class == "WanPipeline":
        return single_file_utils.convert_wan_transformer_to_diffusers(file)
    split = torch.split
    sizes = [QUERIES, KEYS, KEYS]
    monkeypatch.setattr(torch, "split", lambda tensor, _, dim: split(tensor, sizes, dim))
    return single_file_utils.convert_lumina2_to_diffusers(file)


def assert_same(one: Weights, other: Weights) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("layout", ["original", "comfyui"])
def test_written_files_are_read_by_diffusers_and_fewstep(
    folder: Path, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    model, family = load(folder), resolve_family(folder)
    file = write_transformer(model.transformer, tmp_path / "model.safetensors", family, layout)
    written = load_file(file)
    assert all(name.startswith("model.diffusion_model.") for name in written) is (layout == "comfyui")
    assert_same(dict(read_transformer(file, family, model.transformer.config).state_dict()), weights)
    assert_same(converted(written, folder, monkeypatch), weights)


def test_diffusers_names_in_one_file_are_read(folder: Path, weights: Weights, tmp_path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    model = load(folder)
    found = read_transformer(tmp_path / "model.safetensors", resolve_family(folder), model.transformer.config)
    assert_same(dict(found.state_dict()), weights)


def test_the_file_of_another_size_is_refused(folder: Path, tmp_path: Path) -> None:
    model, family = load(folder), resolve_family(folder)
    file = write_transformer(model.transformer, tmp_path / "model.safetensors", family, "original")
    key = next(name for name in load_file(file) if name.endswith(("qkv.weight", ".q.weight")))
    save_file(load_file(file) | {key: torch.zeros(6, 48)}, file)
    wanted = r"qkv.weight has 6 rows, expected (48|72|96)|attn2.to_q.weight is .6, 48., expected .24, 24."
    with pytest.raises(UserError, match=f"model.safetensors: .*({wanted})"):
        read_transformer(file, family, model.transformer.config)


def test_a_lora_with_the_original_names_is_read(folder: Path, weights: Weights, tmp_path: Path) -> None:
    model, family = load(folder), resolve_family(folder)
    original = family.key_layouts["original"].to_format(weights)
    key = next(name for name in original if name.endswith(("qkv.weight", ".q.weight")))
    down, up = torch.randn(2, original[key].shape[1]), torch.randn(original[key].shape[0], 2)
    layer = "diffusion_model." + key.removesuffix(".weight")
    lora = tmp_path / "lora.safetensors"
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, lora)
    save_file(original | {key: original[key] + up @ down}, tmp_path / "changed.safetensors")
    expected = read_transformer(tmp_path / "changed.safetensors", family, model.transformer.config).state_dict()
    merged = load(folder, loras={str(lora): 1.0}).transformer.state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name])


def test_the_command_converts_there_and_back(folder: Path, weights: Weights, tmp_path: Path) -> None:
    file, back = tmp_path / "model.safetensors", tmp_path / "back"
    for words in (
        ["convert", str(folder), "--to", "comfyui", "--out", str(file)],
        ["convert", str(file), "--components-from", str(folder), "--out", str(back)],
    ):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    assert_same(dict(load(back).transformer.state_dict()), weights)
