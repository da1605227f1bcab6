"""Frozen weights in fp8: products, gradients, and the distillations and images that use them."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from fewstep import api
from fewstep.cli.main import app
from fewstep.config.load import load_recipe
from fewstep.errors import UserError
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.methods.models_setup import build_models
from fewstep.models.adapters import active_adapters, adapter_parameters, add_adapter
from fewstep.models.pipeline import load
from fewstep.models.quantize import FP8, Fp8Linear, fp8_matmul, quantize_fp8_, quantize_rowwise, supports_fp8_matmul
from fewstep.models.zimage.denoiser import ZImageDenoiser
from fewstep.models.zimage.family import ZIMAGE

torch.manual_seed(0)


def bytes_of(module):
    return sum(p.numel() * p.element_size() for p in module.parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradient_equal_those_of_the_dequantized_matrix(bias):
    linear = nn.Linear(40, 24, bias=bias)
    linear.weight.data *= torch.logspace(-6, 3, 24)[:, None]  # rows of very different size
    quantized, dequantized = Fp8Linear(linear), copy.deepcopy(linear)
    with torch.no_grad():
        dequantized.weight.copy_(quantized.weight.float() * quantized.scale[:, None])
        off = (dequantized.weight - linear.weight).abs().amax(dim=1) / linear.weight.abs().amax(dim=1)
        assert 0.001 < off.max() < 2**-4 * 1.01  # e4m3 has three mantissa bits
    x = torch.randn(3, 5, 40, requires_grad=True)
    outputs, gradients = [], []
    for layer in (quantized, dequantized):
        y = layer(x)
        gradients.append(torch.autograd.grad((y * torch.arange(24)).sum(), x)[0])
        outputs.append(y)
    torch.testing.assert_close(*outputs, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-5)
    assert quantized.weight.dtype == FP8
    assert not quantized.weight.requires_grad


@pytest.mark.parametrize("bias", [True, False])
def test_fp8_products_equal_those_of_the_quantized_factors(bias):
    """They differ from the exact product by a few percent, because e4m3 has three mantissa bits."""
    linear = nn.Linear(64, 48, bias=bias)
    linear.weight.data *= torch.logspace(-3, 2, 48)[:, None]
    layer = Fp8Linear(linear, dynamic_activation_quant=True)
    x = (torch.randn(3, 5, 64) * torch.logspace(-4, 4, 15).reshape(3, 5, 1)).bfloat16()  # tokens of very different size
    quantized, scale = quantize_rowwise(x.reshape(15, 64))
    expected = (quantized.float() * scale) @ (layer.weight.float() * layer.scale[:, None]).T
    product = fp8_matmul(x, layer.weight, layer.scale)
    assert product.shape == (3, 5, 48)
    assert product.dtype == torch.bfloat16
    error = (product.reshape(15, 48).float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 5e-3
    with torch.no_grad():
        exact, found = linear(x.float()).flatten(0, 1), layer(x).float().flatten(0, 1)
    off = (found - exact).norm(dim=1) / exact.norm(dim=1)
    assert 0.005 < off.max() < 0.15


def test_fp8_products_are_used_where_they_are_fast(tiny_folder, monkeypatch):
    assert not supports_fp8_matmul("cpu")
    for capability, able in (((8, 6), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert supports_fp8_matmul("cuda:0") == able
    wide = load(tiny_folder, dtype=FP8)
    monkeypatch.setattr("fewstep.models.pipeline.supports_fp8_matmul", lambda device: True)
    able = load(tiny_folder, dtype=FP8)
    assert {m.dynamic_activation_quant for m in able.transformer.modules() if isinstance(m, Fp8Linear)} == {True}
    images = [generate(model, ["a fox", "a dog"], SamplingParams(steps=3)).images.float() for model in (wide, able)]
    assert 0 < (images[0] - images[1]).abs().mean() < 8  # of 255


def test_a_row_of_zeros_stays_zero():
    linear = nn.Linear(4, 2, bias=False)
    linear.weight.data[0] = 0
    y = Fp8Linear(linear)(torch.ones(1, 4))
    assert y[0, 0] == 0
    assert y.isfinite().all()


def test_autocast_computes_in_its_dtype_and_no_dequantized_weight_is_saved():
    layer, kept = Fp8Linear(nn.Linear(64, 64)), []
    x = torch.randn(2, 64, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert all(t.dtype == FP8 for t in kept if t.numel() == 64 * 64)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_only_matrices_of_blocks_are_quantized(tiny):
    transformer = copy.deepcopy(tiny.transformer).bfloat16()
    quantize_fp8_(transformer, ZIMAGE.quantizable_modules)
    quantized = {name for name, module in transformer.named_modules() if isinstance(module, Fp8Linear)}
    assert len(quantized) == 7 * 4  # two layers and the two refiners'
    assert not any(part in name for name in quantized for part in ("embedder", "final", "adaLN"))
    assert {p.dtype for p in transformer.parameters()} == {torch.bfloat16, FP8}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_adapters_train_as_on_the_dequantized_base(tiny, checkpointed):
    quantized = copy.deepcopy(tiny.transformer)
    add_adapter(quantized, "student", rank=2, target_modules=ZIMAGE.lora_target_modules)
    dequantized = copy.deepcopy(quantized)
    quantize_fp8_(quantized, ZIMAGE.quantizable_modules)
    for name, module in quantized.named_modules():
        if isinstance(module, Fp8Linear):
            dequantized.get_submodule(name).weight.data = module.weight.float() * module.scale[:, None]
    prompts, x, sigma = tiny.encode(["a fox", "a dog"]), torch.randn(2, 16, 8, 8), torch.rand(2)
    gradients = []
    for transformer in (quantized, dequantized):
        denoiser = ZImageDenoiser(transformer)
        if checkpointed:
            denoiser.enable_gradient_checkpointing()
        with active_adapters(transformer, {"student": 1.0}):
            denoiser(x, sigma, prompts).square().mean().backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(transformer, "student").items()})
    assert max(gradient.abs().max() for gradient in gradients[0].values()) > 1e-4
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("train", [pytest.param("lora", marks=pytest.mark.slow), "full"])
def test_a_distillation_with_an_fp8_teacher(tiny_folder, tmp_path, train):
    overrides = [
        f"teacher={tiny_folder}", f"models.train={train}", "models.frozen_dtype=fp8", "train.steps=2",
        "train.batch_size=2", "train.precision=bf16", "train.sample_every=0", "evaluate.enabled=false",
        "evaluate.validate_every=0",
        "method.terms={cfg_augmentation: {}, distribution_matching: {}}", "method.fake_score_start=0",
        "optim.student={lr: 0.01}",
    ]  # fmt: skip
    models = build_models(load_recipe("micro-aligned", overrides), load(tiny_folder, dtype=torch.bfloat16))
    assert any(p.dtype == FP8 for p in models.teacher.transformer.parameters())
    assert {p.dtype for p in models.student.denoiser.parameters()} == {torch.float32}

    made = api.distill("micro-aligned", tmp_path / "run", overrides=overrides)
    student = load(made.student, dtype=torch.float32)
    if train == "lora":  # the adapter is merged into the stored weights of the teacher
        lora = load_file(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors")
        name = "layers.0.attention.to_q"
        added = lora[f"transformer.{name}.lora_B.weight"] @ lora[f"transformer.{name}.lora_A.weight"]
        assert added.abs().max() > 1e-4
        expected = load(tiny_folder).transformer.get_submodule(name).weight + added
        torch.testing.assert_close(student.transformer.get_submodule(name).weight, expected, atol=1e-2, rtol=1e-2)


def test_images_in_fp8_are_close_to_bf16(tiny_folder, tmp_path):
    half, eighth = load(tiny_folder, dtype=torch.bfloat16), load(tiny_folder, dtype=FP8)
    saved = sum(p.numel() for p in eighth.transformer.parameters() if p.dtype == FP8)
    assert bytes_of(eighth.transformer) == bytes_of(half.transformer) - saved
    images = [generate(model, ["a fox", "a dog"], SamplingParams(steps=3)).images.float() for model in (half, eighth)]
    assert 0 < (images[0] - images[1]).abs().mean() < 6  # of 255
    with pytest.raises(UserError, match="fp8 cannot be saved"):
        eighth.save(tmp_path / "model")
    command = ["generate", str(tiny_folder), "a fox", "--dtype", "fp8", "-o", str(tmp_path / "a.png")]
    assert CliRunner().invoke(app, command).exit_code == 0
