"""Single files: those of other programs are read, and other programs read those written here."""

import sys

import gguf
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from memory import peak_bytes
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.errors import UserError
from fewstep.export.diffusers import to_diffusers
from fewstep.export.single_file import write_transformer
from fewstep.models.pipeline import load
from fewstep.models.single_file import read_transformer
from fewstep.models.zimage.family import ZIMAGE


def as_released(weights, prefix=""):
    """The original release's file, by code that is independent of the project's."""
    file = {}
    for name, tensor in weights.items():
        words = name.split(".")
        if "to_q" in words:
            block = name[: name.index(".attention.")]
            q, k, v = (weights[f"{block}.attention.to_{letter}.weight"] for letter in "qkv")
            file[f"{prefix}{block}.attention.qkv.weight"] = torch.cat([q, k, v], dim=0)
        elif "to_k" in words or "to_v" in words:
            continue
        elif words[0] in ("all_x_embedder", "all_final_layer"):
            file[prefix + ".".join([words[0][4:], *words[2:]])] = tensor
        elif "to_out" in words:
            file[prefix + name.replace("to_out.0", "out")] = tensor
        elif len(words) > 1 and words[-2] in ("norm_q", "norm_k"):
            file[prefix + name.replace(words[-2], f"{words[-2][-1]}_norm")] = tensor
        else:
            file[prefix + name] = tensor
    return {name: tensor.contiguous() for name, tensor in file.items()}


@pytest.fixture(scope="module")
def weights(tiny):
    return {name: tensor.clone() for name, tensor in tiny.transformer.state_dict().items()}


def read(tiny, file):
    return read_transformer(file, ZIMAGE, tiny.transformer.config).state_dict()


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_released_files_are_read(tmp_path, tiny, weights, prefix):
    file = tmp_path / "model.safetensors"
    extra = {f"{prefix}norm_final.weight": torch.ones(4)}  # in the released file, and unused
    save_file(as_released(weights, prefix) | extra, file)
    assert_same(read(tiny, file), weights)


def test_diffusers_names_in_one_file_are_read(tmp_path, tiny, weights):
    save_file(weights, tmp_path / "model.safetensors")
    assert_same(read(tiny, tmp_path / "model.safetensors"), weights)


def test_a_model_that_was_read_computes_the_same(tmp_path, tiny, weights):
    save_file(as_released(weights), tmp_path / "model.safetensors")
    found = read_transformer(tmp_path / "model.safetensors", ZIMAGE, tiny.transformer.config)
    models = (to_diffusers(tiny.transformer, ZIMAGE), found)
    torch.manual_seed(0)
    x, features = [torch.randn(16, 1, 8, 8)], [torch.randn(7, tiny.transformer.config["cap_feat_dim"])]
    with torch.no_grad():
        outputs = [model(x, torch.tensor([0.4]), features, return_dict=False)[0] for model in models]
    torch.testing.assert_close(outputs[0][0], outputs[1][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["original", "comfyui"])
def test_written_files_are_read_by_diffusers_and_fewstep(tmp_path, tiny, weights, layout):
    file = write_transformer(tiny.transformer, tmp_path / "new" / "model.safetensors", ZIMAGE, layout)
    assert_same(convert_z_image_transformer_checkpoint_to_diffusers(load_file(file)), weights)
    assert_same(read(tiny, file), weights)
    prefix = "model.diffusion_model." if layout == "comfyui" else ""
    assert_same(load_file(file), as_released(weights, prefix))
    assert [path.name for path in file.parent.iterdir()] == ["model.safetensors"]


def test_dtype_of_a_written_file(tmp_path, tiny, weights):
    file = write_transformer(tiny.transformer, tmp_path / "model.safetensors", ZIMAGE, "comfyui", torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    assert_same(read(tiny, file), {name: tensor.bfloat16().float() for name, tensor in weights.items()})


@pytest.mark.parametrize("ending", [None, "scale_weight", "weight_scale"])
def test_fp8_files_are_dequantized(tmp_path, tiny, weights, ending):
    """Plain fp8, and fp8 with a scale for each matrix in either spelling; other tensors stay as they are."""
    file, expected = {}, {}
    for name, tensor in as_released(weights).items():
        if tensor.ndim != 2 or not name.endswith(".weight"):
            file[name] = expected[name] = tensor
            continue
        scale = tensor.abs().max() / 400 if ending else torch.tensor(1.0)
        file[name] = (tensor / scale).to(torch.float8_e4m3fn)
        expected[name] = file[name].float() * scale
        if ending:
            file[f"{name.removesuffix('.weight')}.{ending}"] = scale
    if ending == "scale_weight":
        file["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    save_file(file, tmp_path / "model.safetensors")
    found = read(tiny, tmp_path / "model.safetensors")
    assert_same(found, convert_z_image_transformer_checkpoint_to_diffusers(dict(expected)))
    if ending:  # without the scale small weights would be lost
        name = "layers.0.attention.to_q.weight"
        assert (found[name] - weights[name]).abs().max() < 0.07 * weights[name].abs().max()


def in_fp8(weights, scale_of, ending="weight_scale"):
    """ComfyUI's file with matrices in e4m3, each with a scale of the given shape and hints that are not needed."""
    file, expected = {}, {}
    for name, tensor in as_released(weights).items():
        if tensor.ndim != 2 or not name.endswith(".weight"):
            file[f"model.diffusion_model.{name}"] = expected[name] = tensor
            continue
        scale, stem = scale_of(tensor), f"model.diffusion_model.{name.removesuffix('.weight')}"
        factor = scale if scale.numel() else torch.tensor(1.0)
        file[f"{stem}.weight"] = (tensor / factor.reshape(-1, 1)).to(torch.float8_e4m3fn)
        expected[name] = file[f"{stem}.weight"].float() * factor.reshape(-1, 1)
        file[f"{stem}.{ending}"] = scale
        file[f"{stem}.input_scale"] = torch.tensor(1.0)
        file[f"{stem}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    return file, convert_z_image_transformer_checkpoint_to_diffusers(expected)


@pytest.mark.parametrize(
    "scale_of",
    [
        lambda tensor: tensor.abs().max() / 400,
        lambda tensor: tensor.abs().amax(dim=1) / 400,
        lambda tensor: tensor.abs().amax(dim=1, keepdim=True) / 400,
        lambda tensor: torch.empty(0),
    ],
    ids=["matrix", "rows", "column of rows", "empty"],
)
def test_scales_of_every_shape_are_applied(tmp_path, tiny, weights, scale_of):
    file, expected = in_fp8(weights, scale_of)
    save_file(file, tmp_path / "model.safetensors")
    assert_same(read(tiny, tmp_path / "model.safetensors"), expected)


def test_unsupported_storage_types_are_refused(tmp_path, tiny, weights):
    """Read as plain numbers they would be noise."""
    stem, path = "model.diffusion_model.layers.0.attention.out", tmp_path / "model.safetensors"
    whole, _ = in_fp8(weights, lambda tensor: tensor.abs().max() / 400)
    kind = {f"{stem}.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}
    integers = {f"{stem}.weight": torch.zeros(48, 48, dtype=torch.int8)}
    blocks = {f"{stem}.weight_scale": torch.ones(48, 3)}
    for change, message in (
        (kind, f"{stem}: unsupported storage type nvfp4"),
        (integers, f"{stem}.weight: unsupported storage type torch.int8"),
        (blocks, f"{stem}.weight_scale is \\(48, 3\\), expected one scale, or one for each row"),
    ):
        save_file(whole | change, path)
        with pytest.raises(UserError, match=f"model.safetensors: {message}"):
            read(tiny, path)


def test_the_transformer_of_a_whole_checkpoint_is_read(tmp_path, tiny, weights):
    more = {"vae.decoder.conv_in.bias": torch.ones(3), "text_encoders.qwen3_4b.transformer.x": torch.ones(3)}
    save_file(as_released(weights, "model.diffusion_model.") | more, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"model.safetensors: only the transformer is read"):
        assert_same(read(tiny, tmp_path / "model.safetensors"), weights)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_gguf_files_are_read(tmp_path, tiny, weights, kind):
    """Written by gguf's own writer: matrices in a format, the rest in fp32, pad tokens flat."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "lumina2")
    packed = []
    for name, tensor in as_released(weights).items():
        values = tensor.flatten() if name.endswith("pad_token") else tensor
        fits = tensor.ndim == 2 and name.endswith(".weight") and (kind != "Q8_0" or tensor.shape[1] % 32 == 0)
        packed += [name] if fits and name in weights else []
        form = gguf.GGMLQuantizationType[kind if fits else "F32"]
        writer.add_tensor(name, gguf.quantize(values.numpy(), form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read(tiny, tmp_path / "model.gguf")
    assert found.keys() == weights.keys()
    tolerance = {"F32": 0.0, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2}[kind]
    for name, tensor in weights.items():
        assert (found[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name
    assert packed
    for name in packed:
        assert torch.equal(found[name], weights[name]) == (kind == "F32"), name


def test_bad_gguf_files_are_named(tmp_path, tiny, monkeypatch):
    (tmp_path / "bad.gguf").write_bytes(b"nothing of the kind, but long enough for a header" * 9)
    with pytest.raises(UserError, match=r"bad.gguf: not a gguf file, or damaged"):
        read(tiny, tmp_path / "bad.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"need the gguf package; pip install 'fewstep\[gguf\]'"):
        read(tiny, tmp_path / "bad.gguf")


def test_flat_pad_tokens_are_reshaped(tmp_path, tiny, weights):
    file = as_released(weights)
    for name in ("x_pad_token", "cap_pad_token"):
        file[name] = file[name].flatten()
    save_file(file, tmp_path / "model.safetensors")
    assert_same(read(tiny, tmp_path / "model.safetensors"), weights)


def test_errors_name_file_and_tensor(tmp_path, tiny, weights):
    file = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"model.safetensors: no such file"):
        read(tiny, file)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="not a safetensors file, or damaged"):
        read(tiny, file)
    released = as_released(weights)
    save_file({name: tensor for name, tensor in released.items() if "cap_embedder.1.weight" not in name}, file)
    with pytest.raises(UserError, match=r"one missing tensor: cap_embedder.1.weight"):
        read(tiny, file)
    save_file(released | {"layers.99.odd.weight": torch.zeros(2)}, file)
    with pytest.raises(UserError, match=r"one unexpected tensor: layers.99.odd.weight"):
        read(tiny, file)
    save_file(released | {"cap_embedder.1.weight": torch.zeros(3, 2)}, file)
    with pytest.raises(UserError, match=r"cap_embedder.1.weight is \(3, 2\), expected"):
        read(tiny, file)


def test_convert_there_and_back(tmp_path, tiny_folder, weights):
    def convert(*words):
        return CliRunner().invoke(app, ["convert", *map(str, words)])

    single, folder = tmp_path / "one.safetensors", tmp_path / "folder"
    assert convert(tiny_folder, "--to", "comfyui", "--out", single).exit_code == 0
    assert convert(single, "--components-from", tiny_folder, "--out", folder).exit_code == 0
    assert_same(load(folder).transformer.state_dict(), weights)
    for words, message in (
        ((single, "--out", tmp_path / "other"), "give --components-from"),
        ((tiny_folder, "--out", folder), "already exists"),
        ((tiny_folder, "--to", "original", "--out", tmp_path / "plain"), "must end with .safetensors"),
    ):
        done = convert(*words)
        assert done.exit_code == 1
        assert message in done.output


def test_a_written_folder_has_the_dtype_of_the_file(tmp_path, tiny_folder, weights):
    """fp8 becomes bf16, not fp32: a folder of twice the file's size, not of four times."""

    def converted(name, file, *words):
        save_file(file, tmp_path / f"{name}.safetensors")
        words = [tmp_path / f"{name}.safetensors", "--components-from", tiny_folder, "--out", tmp_path / name, *words]
        done = CliRunner().invoke(app, ["convert", *map(str, words)])
        assert done.exit_code == 0, done.output
        return load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")

    half = {name: tensor.bfloat16() for name, tensor in as_released(weights).items()}
    narrow, expected = in_fp8(weights, lambda tensor: tensor.abs().max() / 400)
    assert_same(converted("half", half), {name: tensor.bfloat16() for name, tensor in weights.items()})
    assert_same(converted("narrow", narrow), {name: tensor.bfloat16() for name, tensor in expected.items()})
    assert_same(converted("wide", narrow, "--dtype", "fp32"), expected)
    words = [tmp_path / "half", "--to", "comfyui", "--out", tmp_path / "back.safetensors"]
    assert CliRunner().invoke(app, ["convert", *map(str, words)]).exit_code == 0
    back = load_file(tmp_path / "back.safetensors")
    assert_same({name.removeprefix("model.diffusion_model."): tensor for name, tensor in back.items()}, half)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float8_e4m3fn"])
def test_reading_takes_no_more_memory_than_the_weights(tiny, tmp_path, stored):
    deep = {**tiny.transformer.config, "dim": 384, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [32, 32, 32]}
    large = type(tiny.transformer).from_config({**deep, "n_layers": 30})
    released = as_released({name: tensor.clone() for name, tensor in large.state_dict().items()})
    kind = getattr(torch, stored)
    save_file({name: t.to(kind) if t.ndim == 2 else t for name, t in released.items()}, tmp_path / "model.safetensors")
    most = peak_bytes(lambda: read_transformer(tmp_path / "model.safetensors", ZIMAGE, large.config, torch.bfloat16))
    most -= (tmp_path / "model.safetensors").stat().st_size  # which is memory-mapped
    # of bf16, only parts of fused matrices are copied; the rest stays memory-mapped
    assert most < {"bfloat16": 0.4}.get(stored, 1.05) * sum(2 * p.numel() for p in large.parameters())


@pytest.mark.parametrize(("dtype", "reason"), [("fp16", "overflow in it; take bf16"), ("fp8", "not written")])
def test_dtypes_that_cannot_be_written_are_refused(tmp_path, tiny_folder, dtype, reason):
    out = tmp_path / "one.safetensors"
    words = ["convert", str(tiny_folder), "--to", "comfyui", "--out", str(out), "--dtype", dtype]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert reason in done.stderr
    assert not out.exists()
