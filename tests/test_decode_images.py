"""Decoding with gradient: the same images and gradients as the plain way, in bounded memory."""

import pytest
import torch
from memory import peak_bytes
from torch import Tensor

from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.rewards.decode import decode_images


@pytest.fixture(scope="module")
def pipeline() -> TextToImagePipeline:
    return load("micro", "cpu", torch.float32)


def latents(pipeline: TextToImagePipeline, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *pipeline.latent_shape(64, 64), generator=generator).requires_grad_()


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_images_and_gradients_are_those_of_the_plain_way(pipeline: TextToImagePipeline, micro_batch: int) -> None:
    weight = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    plain, other = latents(pipeline, 3), latents(pipeline, 3)
    images = pipeline.family.decode_latents(pipeline.vae, plain)
    (images * weight).sum().backward()
    decoded = decode_images(pipeline, other, micro_batch)
    (decoded * weight).sum().backward()
    torch.testing.assert_close(decoded, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(other.grad, plain.grad, rtol=1e-4, atol=1e-4)
    assert float(decoded.detach().min()) >= 0
    assert float(decoded.detach().max()) <= 1


def test_without_gradient_nothing_is_recomputed(pipeline: TextToImagePipeline) -> None:
    fixed = latents(pipeline, 3).detach()
    decoded = decode_images(pipeline, fixed, 2)
    assert not decoded.requires_grad
    torch.testing.assert_close(decoded, pipeline.family.decode_latents(pipeline.vae, fixed), rtol=0, atol=1e-5)


def test_memory_is_that_of_one_micro_batch(pipeline: TextToImagePipeline) -> None:
    def peak(count: int, micro_batch: int) -> int:
        part = latents(pipeline, count)
        return peak_bytes(lambda: decode_images(pipeline, part, micro_batch).mean().backward())

    def plain(count: int) -> int:
        part = latents(pipeline, count)
        return peak_bytes(lambda: pipeline.family.decode_latents(pipeline.vae, part).mean().backward())

    one, four = peak(1, 1), peak(4, 1)
    images = 4 * 3 * 64 * 64 * 4
    assert four < one + 6 * images
    assert four < plain(4) / 2
