"""Folders written by other programs, and damaged ones: errors name the file and the tensor."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.errors import UserError
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.components import load_component, resolve_model
from fewstep.models.pipeline import load
from fewstep.models.zimage.family import ZIMAGE

FILES = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def same(part, other):
    assert part.keys() == other.keys()
    for name, tensor in part.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_wrong_tensors_are_named(folder, part, damage):
    file = folder / part / FILES[part]
    weights = load_file(file)
    name = sorted(key for key in weights if key.endswith(".weight"))[1]
    if damage == "missing":
        del weights[name]
    elif damage == "extra":
        weights["more.weight"] = torch.zeros(3)
    else:
        weights[name] = torch.zeros(7, 5)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError) as error:
        load(folder)
    problem = {"missing": "one missing tensor", "extra": "one unexpected tensor: more.weight", "shape": "5"}[damage]
    for words in (str(folder / part), problem, "more.weight" if damage == "extra" else name.removeprefix("model.")):
        assert words in str(error.value)


def test_sharded_components(tiny, folder):
    shutil.rmtree(folder / "transformer")
    tiny.transformer.save_pretrained(folder / "transformer", max_shard_size="50KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    same(load(folder).transformer.state_dict(), tiny.transformer.state_dict())


def test_a_text_encoder_stored_as_a_causal_language_model(tiny, folder):
    """As in Z-Image's release: every name has a prefix, and there is a token head."""
    file = folder / "text_encoder" / FILES["text_encoder"]
    weights = {f"model.{name.removeprefix('model.')}": tensor for name, tensor in load_file(file).items()}
    weights["lm_head.weight"] = torch.zeros_like(weights["model.embed_tokens.weight"])
    save_file(weights, file, {"format": "pt"})
    same(load(folder).text_encoder.state_dict(), tiny.text_encoder.state_dict())


def test_each_component_keeps_its_dtype_by_default(tiny, folder):
    for part, dtype in (("transformer", torch.bfloat16), ("vae", torch.float16)):
        weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / part / FILES[part]).items()}
        save_file(weights, folder / part / FILES[part], {"format": "pt"})
    found = load(folder)
    assert found.transformer.dtype == torch.bfloat16
    assert found.vae.dtype == found.text_encoder.dtype == torch.float32  # fp16 overflows in this family
    assert {load(folder, dtype=torch.float32).transformer.dtype} == {torch.float32}
    assert generate(found, ["a fox"], SamplingParams(steps=2)).images.float().std() > 1


def test_pickled_weights_are_refused(folder):
    file = folder / "transformer" / FILES["transformer"]
    torch.save(load_file(file), folder / "transformer" / "diffusion_pytorch_model.bin")
    file.unlink()
    with pytest.raises(UserError, match=r"model.safetensors: no such file; diffusion_pytorch_model.bin is pickled"):
        load(folder)


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_a_cached_hub_id_is_found(tiny, tiny_folder, tmp_path, monkeypatch):
    """The hub's cache on disk, as after a download."""
    kept, commit = tmp_path / "hub" / "models--someone--picture", "0" * 40
    shutil.copytree(tiny_folder, kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve_model("someone/picture") == resolve_model("hf:someone/picture") == kept / "snapshots" / commit
    same(load("someone/picture").transformer.state_dict(), tiny.transformer.state_dict())
    with pytest.raises(UserError, match=r"someone/other: .*not in the cache"):
        resolve_model("someone/other")


@pytest.mark.parametrize("name", ["z_image.safetensors", "unets/z_image.gguf"])
def test_the_error_for_a_single_file_gives_the_command_that_converts_it(name):
    with pytest.raises(UserError, match=f"{name}: a single file; .* fewstep convert {name} --components-from MODEL"):
        resolve_model(name)


def test_a_missing_folder_beside_others_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="runs/mine: no model found"):
        resolve_model("runs/mine")


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURED = """
import sys, threading
from pathlib import Path
import torch
from fewstep.models.components import load_component
from fewstep.models.zimage.family import ZIMAGE

def held():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, held())

before = peak = held()
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
part = load_component(Path(sys.argv[1]), "transformer", getattr(torch, sys.argv[2]), ZIMAGE)
done.set()
watcher.join()
print((peak - before) / sum(p.numel() * p.element_size() for p in part.parameters()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ("float32", "bfloat16"),
        pytest.param("bfloat16", "float32", marks=pytest.mark.slow),
        pytest.param("float32", "float32", marks=pytest.mark.slow),
    ],
)
def test_loading_takes_no_more_memory_than_the_weights(tiny, tmp_path, stored, wanted):
    config = {**tiny.transformer.config, "dim": 768, "n_heads": 8, "n_kv_heads": 8, "axes_dims": [32, 32, 32]}
    large = type(tiny.transformer).from_config({**config, "n_layers": 4}).to(getattr(torch, stored))
    large.save_pretrained(tmp_path / "transformer")
    command = [sys.executable, "-c", MEASURED, str(tmp_path), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # a bf16 model from a bf16 file takes less: it is memory-mapped
    assert float(done.stdout) < 1.1


def test_the_error_for_a_component_names_its_folder(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"vae/model.safetensors: no such file"):
        load_component(tmp_path, "vae", torch.float32, ZIMAGE)


def test_an_unsupported_pipeline_is_refused(folder):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline"}))
    with pytest.raises(UserError, match=r"model_index.json: 'SanaPipeline' is not a supported pipeline; .*ZImagePipe"):
        load(folder)
    (folder / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=r"model_index.json: no _class_name"):
        load(folder)
