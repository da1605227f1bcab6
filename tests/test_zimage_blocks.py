"""Blocks are modules: checkpointing, offloading, hooks and compilation compose in any order."""

import copy
from contextlib import nullcontext
from itertools import permutations

import pytest
import torch
from zimage_setup import prompts_of, small_transformer

from fewstep.models.offload import offload_blocks
from fewstep.models.zimage.denoiser import ZImageDenoiser


@pytest.fixture
def transformer():
    return small_transformer()


def count_calls(denoiser):
    for block in denoiser.get_blocks():
        block.calls = []
        block.register_forward_hook(lambda block, *_: block.calls.append(1))


FEATURES_OF_BLOCKS = {
    "checkpointing": ZImageDenoiser.enable_gradient_checkpointing,
    "offloading": lambda denoiser: offload_blocks(denoiser, "cpu"),
    "hooks": count_calls,
    "compile": ZImageDenoiser.compile_repeated_blocks,
}


def velocity_and_gradients(denoiser, x, sigma, prompts):
    x = x.clone().requires_grad_(True)
    velocity = denoiser(x, sigma, prompts)
    velocity.square().mean().backward()
    return velocity.detach(), x.grad, {name: p.grad for name, p in denoiser.named_parameters() if p.grad is not None}


def assert_composes(transformer, order):
    prompts, x, sigma = prompts_of([5, 40]), torch.randn(2, 16, 8, 8), torch.rand(2)
    plain, combined = (ZImageDenoiser(copy.deepcopy(transformer)) for _ in range(2))
    for name in order:
        FEATURES_OF_BLOCKS[name](combined)
    expected = velocity_and_gradients(plain, x, sigma, prompts)
    torch.testing.assert_close(velocity_and_gradients(combined, x, sigma, prompts), expected, atol=1e-5, rtol=1e-4)
    assert len(expected[2]) > 50
    assert [len(block.calls) for block in combined.get_blocks()] == [2, 2, 2, 2]  # once for each of two caption lengths


@pytest.mark.parametrize("order", list(permutations(["checkpointing", "offloading", "hooks"])), ids=" ".join)
def test_blocks_compose_in_any_order(transformer, order):
    assert_composes(transformer, order)


@pytest.mark.slow
@pytest.mark.parametrize("order", list(permutations(FEATURES_OF_BLOCKS)), ids=" ".join)
def test_blocks_compose_with_compilation_in_any_order(transformer, order):
    torch._dynamo.reset()  # graphs of other tests count towards the limit beyond which nothing is compiled
    assert_composes(transformer, order)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_offloaded_weights_are_on_the_device_where_they_are_recomputed(transformer):
    """On the device "meta", a block that is recomputed with weights on the CPU raises an error."""
    denoiser, computed = ZImageDenoiser(transformer.requires_grad_(False)), []
    denoiser.enable_gradient_checkpointing()
    offload_blocks(denoiser, "meta")
    for index, block in enumerate(denoiser.get_blocks()):
        block.contexts.append(lambda _, index=index: nullcontext(computed.append(index)))
    x = torch.randn(1, 16, 8, 8, device="meta", requires_grad=True)
    prompts = prompts_of([5])
    denoiser(x, torch.rand(1, device="meta"), prompts.to("meta")).sum().backward()
    assert x.grad.shape == x.shape
    assert sorted(computed) == [0, 0, 1, 2, 2, 3, 3]  # no gradient reaches the caption's block, number 1
    assert {p.device.type for block in denoiser.get_blocks() for p in block.parameters()} == {"cpu"}
