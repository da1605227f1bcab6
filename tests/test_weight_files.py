"""Only the files that diffusers and transformers open decide how a model is read, and whether it can be."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import write
from test_components import FILES
from tiny_checkpoints import save_clip
from transformers import CLIPModel
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.config.load import find_recipe
from fewstep.data.trajectories import Index, delete_cache, write_index
from fewstep.errors import UserError
from fewstep.models.checkpoints import load_checkpoint
from fewstep.models.components import resolve_model
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.models.single_file import stored_dtype
from fewstep.training import checkpoint

LITTER = b"\x00\x05\x16\x07" + bytes(200)  # AppleDouble: macOS writes it beside files on foreign file systems


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        load(folder)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", FILES)
def test_files_of_the_operating_system_are_ignored(folder: Path, tiny: TextToImagePipeline, part: str) -> None:
    for name in (FILES[part], "config.json"):
        (folder / part / f"._{name}").write_bytes(LITTER)
    (folder / part / ".DS_Store").write_bytes(LITTER)
    found = load(folder).components[part].state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in tiny.components[part].state_dict().items())


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("variant", ["bf16", "aaa", "fp16"])
def test_a_variant_beside_the_weights_changes_nothing(folder: Path, part: str, variant: str) -> None:
    file = folder / part / FILES[part]
    half = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(half, file.with_suffix(f".{variant}.safetensors"), {"format": "pt"})
    (folder / part / "another.safetensors").write_bytes(b"")
    assert load(folder).components[part].dtype == torch.float32


@pytest.mark.parametrize("part", FILES)
def test_a_variant_alone_is_refused_by_name(folder: Path, part: str) -> None:
    file = folder / part / FILES[part]
    file.rename(file.with_suffix(".fp16.safetensors"))
    name = file.name.removesuffix(".safetensors")
    refused(folder, str(file), f"only the variant {name}.fp16.safetensors", f"rename it to {file.name}")


@pytest.mark.parametrize("narrow", [0, 1, -1])
def test_shards_of_mixed_dtypes_are_not_rounded(folder: Path, tiny: TextToImagePipeline, narrow: int) -> None:
    """Whichever shard is in bf16: the weights of the others stay in fp32."""
    shutil.rmtree(folder / "transformer")
    tiny.transformer.save_pretrained(folder / "transformer", max_shard_size="50KB")
    shards = sorted((folder / "transformer").glob("*.safetensors"))
    assert len(shards) > 2
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(shards[narrow]).items()}
    save_file(rounded, shards[narrow], {"format": "pt"})
    found = load(folder).transformer.state_dict()
    for name, tensor in tiny.transformer.state_dict().items():
        assert torch.equal(found[name], rounded[name].float() if name in rounded else tensor), name


def test_one_wide_tensor_in_a_single_file_is_not_rounded(tmp_path: Path) -> None:
    narrow = {"w": torch.zeros(100, dtype=torch.bfloat16)}
    for more, expected in (({}, torch.bfloat16), ({"norm": torch.ones(2)}, torch.float32)):
        save_file(narrow | more, tmp_path / "model.safetensors")
        assert stored_dtype(tmp_path / "model.safetensors") == expected


def test_a_shard_that_the_index_does_not_name_is_ignored(folder: Path, tiny: TextToImagePipeline) -> None:
    shutil.rmtree(folder / "transformer")
    copy.deepcopy(tiny.transformer).bfloat16().save_pretrained(folder / "transformer", max_shard_size="50KB")
    save_file({"more": torch.zeros(2)}, folder / "transformer" / "a-left-over.safetensors")
    assert load(folder).transformer.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"metadata": {}, "weight_map": {"x": "gone.safetensors"}}, "names gone.safetensors, which is not there"),
        ({"metadata": {}, "weight_map": {"x": "../vae/a.safetensors"}}, "which is not a plain file name"),
        ({"metadata": {}, "weight_map": {}}, "names no weight files"),
        ({"metadata": {}}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_a_wrong_index_is_named(folder: Path, index: object, message: str) -> None:
    file = folder / "transformer" / f"{FILES['transformer']}.index.json"
    file.write_text(json.dumps(index))
    refused(folder, str(file), message)


def test_quantized_weights_in_a_folder_are_refused(folder: Path) -> None:
    """diffusers would read the numbers and leave out their scales: images of noise."""
    file = folder / "transformer" / FILES["transformer"]
    weights = load_file(file)
    name = "layers.0.attention.to_q.weight"
    for dtype in (torch.float8_e4m3fn, torch.int8):
        save_file(weights | {name: weights[name].to(dtype)}, file, {"format": "pt"})
        refused(folder, str(file), f"{name} is quantized")


def test_what_is_there_in_place_of_a_weight_file_is_said(folder: Path) -> None:
    file = folder / "vae" / FILES["vae"]
    for content, kind in (
        (b"", "empty"),
        (LITTER, "macOS"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"PK\x03\x04" + bytes(100), "pickled"),
        (b"GGUF" + bytes(100), "a GGUF file"),
        (bytes(100), "damaged, or not a safetensors file"),
    ):
        file.write_bytes(content)
        refused(folder, str(file), kind)


def test_evaluation_networks_say_which_files_are_there(tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "clip")
    (folder / "._model.safetensors").write_bytes(LITTER)
    load_checkpoint(CLIPModel, str(folder))
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(UserError, match=r"cannot be loaded as CLIPModel: .*only the variant model.fp16.safetensors"):
        load_checkpoint(CLIPModel, str(folder))


def test_the_hub_is_asked_for_what_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, list[str]] = {}
    monkeypatch.setattr("fewstep.models.components.snapshot_download", lambda name, **words: asked.update(words) or ".")
    monkeypatch.chdir(tmp_path)
    resolve_model("someone/picture")
    read = [
        *("model_index.json", "transformer/config.json", "tokenizer/merges.txt", "text_encoder/model.safetensors"),
        *("transformer/diffusion_pytorch_model-00001-of-00003.safetensors", "vae/diffusion_pytorch_model.safetensors"),
        "transformer/diffusion_pytorch_model.safetensors.index.json",
    ]
    others = [
        *("transformer/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16-00001-of-00002.safetensors"),
        *("z_image.safetensors", "split_files/z_image_bf16.safetensors", "vae/diffusion_pytorch_model.bin"),
    ]
    assert list(filter_repo_objects([*read, *others], allow_patterns=asked["allow_patterns"])) == read


def test_checkpoints_ignore_files_of_the_operating_system(tmp_path: Path) -> None:
    newest = write(tmp_path, 10)
    for name in ("._shard-00001-model-00001-of-00001.safetensors", "copy.safetensors"):
        (newest / name).write_bytes(LITTER)
    for name in ("step_old", "step_00000010 copy", "._step_00000010"):
        shutil.copytree(newest, tmp_path / name)
    assert checkpoint.list_checkpoints(tmp_path) == [newest]
    found = checkpoint.latest(tmp_path, print)
    assert found is not None
    assert found.read("one.weights")["w"].unique().tolist() == [10.0]


def test_caches_ignore_files_of_the_operating_system(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in (".DS_Store", "._shard-00000.safetensors"):
        (cache / name).write_bytes(LITTER)
    write_index(cache, Index({"sigmas": [1.0]}, samples=2, shard_size=1, first_seed=0))
    delete_cache(cache)
    assert not list(cache.iterdir())
    (cache / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match=r"has files but no index.json"):
        write_index(cache, Index({"sigmas": [1.0]}, samples=2, shard_size=1, first_seed=0))


def test_bundled_recipes_are_listed_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("kind: distill")
    (tmp_path / "._mine.yaml").write_bytes(LITTER)
    monkeypatch.setattr("fewstep.config.load.BUNDLED_RECIPES", tmp_path)
    with pytest.raises(UserError, match=r"recipes: mine, classifier"):
        find_recipe("nothing")


def test_a_gguf_file_is_known_by_its_content(tmp_path: Path, tiny_folder: Path) -> None:
    """Under the name of a safetensors file too; a pickle under any name is refused with the reason."""
    for name, content, message in (
        ("model.safetensors", b"GGUF" + bytes(100), "not a gguf file, or damaged"),
        ("model.ckpt", b"PK\x03\x04" + bytes(100), "pickled"),
        ("model.bin", b"\x80\x02" + bytes(100), "pickled"),
        ("model.sft", b"", "empty"),
    ):
        (tmp_path / name).write_bytes(content)
        words = ["convert", str(tmp_path / name), "--components-from", str(tiny_folder), "--out", str(tmp_path / "out")]
        done = CliRunner().invoke(app, words)
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
        assert message in done.stderr
