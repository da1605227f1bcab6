"""NF4: the nearest of 16 levels in blocks of 64, gradients through dequantized weights, LoRA on such a base."""

import copy

import pytest
import torch
from lora_training import few_step, image_set, run_lora
from safetensors.torch import load_file

from fewstep.config.load import load_recipe
from fewstep.models.nf4 import BLOCK, LEVELS, Nf4Linear, dequantize_nf4, quantize_nf4, quantize_nf4_
from fewstep.models.quantize import quantize_fp8_
from fewstep.plan.lora import plan_lora

__all__ = ["few_step", "image_set"]  # fixtures


def restored(weight):
    packed, scale = quantize_nf4(weight)
    return dequantize_nf4(packed, scale, weight.shape, torch.float32)


@pytest.mark.parametrize("shape", [(48, 64), (7, 5), (1, 1), (3, 43)])
def test_each_weight_becomes_the_nearest_level_of_its_block(shape):
    weight = torch.randn(*shape) * torch.rand(shape[0], 1)
    flat, found = weight.flatten(), restored(weight).flatten()
    levels = torch.tensor(LEVELS)
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK]
        scale = block.abs().max().bfloat16().float()
        nearest = levels[(block[:, None] / scale - levels).abs().argmin(dim=1)] * scale
        torch.testing.assert_close(found[start : start + BLOCK], nearest)


def test_it_takes_4_25_bits_and_the_error_of_normal_weights_is_a_tenth():
    weight = torch.randn(512, 512)
    packed, scale = quantize_nf4(weight)
    assert packed.nbytes + scale.nbytes == 4.25 / 8 * weight.numel()
    assert (restored(weight) - weight).norm() / weight.norm() == pytest.approx(0.09, abs=0.02)
    assert not restored(torch.zeros(2, 64)).any()


def test_a_layer_computes_with_the_dequantized_weight_in_both_directions():
    linear = torch.nn.Linear(96, 40)
    layer = Nf4Linear(linear)
    plain = torch.nn.Linear(96, 40)
    plain.load_state_dict({"weight": restored(linear.weight.detach()), "bias": linear.bias.detach()})
    x = torch.randn(3, 5, 96, requires_grad=True)
    (own,) = torch.autograd.grad(layer(x).square().sum(), x)
    (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(own, expected)
    assert not any(parameter.requires_grad for name, parameter in layer.named_parameters() if name != "bias")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_the_error_of_a_model_s_predictions_is_above_fp8_s_and_small(tiny):
    torch.manual_seed(0)
    x, sigma, prompts = torch.randn(2, 16, 8, 8), torch.rand(2), tiny.encode(["a dog", "a cat"])
    expected = tiny.denoiser(x, sigma, prompts)
    errors = []
    for quantize in (quantize_fp8_, quantize_nf4_):
        transformer = copy.deepcopy(tiny.transformer)
        quantize(transformer, tiny.family.quantizable_modules)
        found = tiny.family.denoiser(transformer)(x, sigma, prompts)
        errors.append(float((found - expected).norm() / expected.norm()))
    assert 0 < errors[0] < errors[1] < 0.5


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_a_lora_is_trained_on_it_and_resumes_exactly(few_step, image_set, tmp_path, checkpointing):
    more = [f"model={few_step}", f"data.images={image_set}", "models.frozen_dtype=nf4"]
    more += [f"models.gradient_checkpointing={checkpointing}"]
    whole = load_file(run_lora(tmp_path / "whole", *more, "train.steps=3"))
    run_lora(tmp_path / "parts", *more, "train.steps=2")
    parts = load_file(run_lora(tmp_path / "parts", *more, "train.steps=3"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert any(tensor.any() for name, tensor in whole.items() if "lora_B" in name)


@pytest.mark.slow
def test_the_plan_counts_a_quarter_of_bf16_s_blocks():
    """Of Z-Image's 6.15e9 weights 5.9e9 are in the blocks' linear layers."""
    found = {}
    for dtype in ("bf16", "fp8", "nf4"):
        recipe = load_recipe("lora-character-24gb", [f"models.frozen_dtype={dtype}"])
        found[dtype] = plan_lora(recipe).peaks["training step"]["frozen weights"]
    others = found["bf16"] - 2 * 5.9e9
    assert found["nf4"] == pytest.approx(others + 4.25 / 8 * 5.9e9, rel=0.05)
    assert found["nf4"] < 0.6 * found["fp8"]
