"""Folders as others write them, and damaged ones: what is wrong is named, with the file."""

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
    says = {"missing": "missing", "extra": "of no part of the model: more.weight", "shape": "5"}[damage]
    for words in (str(folder / part), says, "more.weight" if damage == "extra" else name.removeprefix("model.")):
        assert words in str(error.value)


def test_sharded_parts(tiny, folder):
    shutil.rmtree(folder / "transformer")
    tiny.transformer.save_pretrained(folder / "transformer", max_shard_size="50KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    same(load(folder).transformer.state_dict(), tiny.transformer.state_dict())


def test_a_text_encoder_with_the_names_of_a_language_model(tiny, folder):
    """As Z-Image's is released: every name with a prefix, and a head for tokens beside."""
    file = folder / "text_encoder" / FILES["text_encoder"]
    weights = {f"model.{name.removeprefix('model.')}": tensor for name, tensor in load_file(file).items()}
    weights["lm_head.weight"] = torch.zeros_like(weights["model.embed_tokens.weight"])
    save_file(weights, file, {"format": "pt"})
    same(load(folder).text_encoder.state_dict(), tiny.text_encoder.state_dict())


def test_without_a_word_each_part_keeps_its_precision(tiny, folder):
    for part, dtype in (("transformer", torch.bfloat16), ("vae", torch.float16)):
        weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / part / FILES[part]).items()}
        save_file(weights, folder / part / FILES[part], {"format": "pt"})
    found = load(folder)
    assert found.transformer.dtype == torch.bfloat16
    assert found.vae.dtype == found.text_encoder.dtype == torch.float32  # fp16 overflows in this family
    assert {load(folder, dtype=torch.float32).transformer.dtype} == {torch.float32}
    assert generate(found, ["a fox"], SamplingParams(steps=2)).images.float().std() > 1


def test_pickled_weights_are_not_opened(folder):
    file = folder / "transformer" / FILES["transformer"]
    torch.save(load_file(file), folder / "transformer" / "diffusion_pytorch_model.bin")
    file.unlink()
    with pytest.raises(UserError, match=r"transformer: cannot be loaded: .*safetensors"):
        load(folder)


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_an_id_of_the_hub_that_was_downloaded(tiny, tiny_folder, tmp_path, monkeypatch):
    """The hub's own cache on disk, as a download leaves it."""
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
    with pytest.raises(UserError, match=r"someone/other: .*not downloaded before"):
        resolve_model("someone/other")


@pytest.mark.parametrize("name", ["z_image.safetensors", "unets/z_image.gguf"])
def test_a_single_file_says_how_to_make_it_a_folder(name):
    with pytest.raises(UserError, match=f"{name}: a single file; .* fewstep convert {name} --base MODEL --out FOLDER"):
        resolve_model(name)


def test_a_folder_that_is_not_there_is_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="runs/mine: no model there"):
        resolve_model("runs/mine")


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURED = """
import sys, threading
from pathlib import Path
import torch
from fewstep.models.components import load_component

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
part = load_component(Path(sys.argv[1]), "transformer", getattr(torch, sys.argv[2]))
done.set()
watcher.join()
print((peak - before) / sum(p.numel() * p.element_size() for p in part.parameters()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("stored", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")]
)
def test_loading_takes_no_more_than_the_weights(tiny, tmp_path, stored, wanted):
    config = {**tiny.transformer.config, "dim": 768, "n_heads": 8, "n_kv_heads": 8, "axes_dims": [32, 32, 32]}
    large = type(tiny.transformer).from_config({**config, "n_layers": 4}).to(getattr(torch, stored))
    large.save_pretrained(tmp_path / "transformer")
    command = [sys.executable, "-c", MEASURED, str(tmp_path), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # a bf16 model out of a bf16 file takes less: it is read where it lies
    assert float(done.stdout) < 1.1


def test_the_part_says_its_folder(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="vae: cannot be loaded"):
        load_component(tmp_path, "vae", torch.float32)
