"""Training of the decoder on inexact latents."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fewstep.config.load import load_recipe
from fewstep.core.conditioning import EncodedPrompts
from fewstep.emoji import train_decoder
from fewstep.emoji.patch_discriminator import PatchDiscriminator, adversarial_losses, discriminator_loss
from fewstep.emoji.recipes import AdversarialLossSettings
from fewstep.emoji.train_decoder import DecoderMethod, predicted_latents
from fewstep.emoji.vae_quality import measure_vae
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.training.run_dir import RunDir


def test_predicted_latents_are_between_exact_ones_and_the_transformers_guess(tiny: TextToImagePipeline) -> None:
    latents = torch.randn(4, *tiny.latent_shape(64, 64))
    prompts = tiny.encode(["a", "b", "c", "d"])
    assert torch.allclose(predicted_latents(tiny, latents, 0.0, prompts), latents)
    off = [(predicted_latents(tiny, latents, sigma, prompts) - latents).square().mean() for sigma in (0.1, 0.9)]
    assert 0 < off[0] < off[1]


def decoder_method(folder: Path, **weights: float) -> tuple[DecoderMethod, tuple[torch.Tensor, torch.Tensor]]:
    """A method, and what it makes of a batch of three."""
    model = load(folder)
    model.vae.decoder.requires_grad_(True)
    method = DecoderMethod(model, AdversarialLossSettings(**weights), latent_noise=0.5, largest_sigma=0.7)
    prompts: EncodedPrompts = model.encode(["a", "b", "c"])
    with torch.no_grad():
        return method, method.collect((torch.rand(3, 3, 64, 64), prompts))


def test_only_the_decoder_has_a_gradient_and_both_halves_count(tiny_folder: Path) -> None:
    method, batch = decoder_method(tiny_folder)
    assert [each.name for each in method.trainables] == ["vae"]
    loss, metrics = method.loss(batch)
    loss.backward()
    trained = {name.split(".")[0] for name, p in method.model.vae.named_parameters() if p.grad is not None}
    assert trained == {"decoder"}
    assert all(p.grad is None for p in method.model.transformer.parameters())
    assert metrics.keys() == {"pixel", "pixel_predicted"}


def test_decoder_and_discriminator_get_a_gradient_from_their_own_loss_alone(tiny_folder: Path) -> None:
    method, batch = decoder_method(tiny_folder, l1=0, adversarial=1, feature_matching=1)
    assert [each.name for each in method.trainables] == ["vae", "discriminator"]
    decoder, discriminator = (list(each.module.parameters()) for each in method.trainables)
    for trainable in method.trainables:
        trainable.loss(batch)[0].backward()
        assert any(p.grad is not None for p in discriminator) == (trainable.name == "discriminator")
        assert any(p.grad is not None for p in decoder) == (trainable.name == "vae")
        method.model.vae.zero_grad()


def test_discriminator_tells_blurred_images_from_real_ones() -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.5, 0.9))
    accuracy = torch.zeros(())
    for _ in range(60):
        real = torch.rand(8, 3, 32, 32) * 2 - 1
        blurred = F.avg_pool2d(real, 3, stride=1, padding=1)
        loss, accuracy = discriminator_loss(network, real, blurred)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert accuracy > 0.95
    of_real, of_blurred = (adversarial_losses(network, real, each) for each in (real, blurred))
    assert of_real[1] == 0 < of_blurred[1]
    assert of_real[0] < of_blurred[0]


def test_recipe_keeps_latents_and_everything_but_the_decoder(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_decoder, "measure_vae", partial(measure_vae, count=4))
    overrides = [f"init={tiny_folder}", "train.steps=2", "train.batch_size=2", "train.precision=fp32"]
    recipe = load_recipe("micro-decoder", overrides)
    with RunDir(tmp_path / "run", recipe) as run:
        folder = train_decoder.train(recipe, run)
    before, after = load(tiny_folder), load(folder)
    images = torch.rand(2, 3, 64, 64)
    latents = before.encode_images(images)
    assert torch.equal(after.encode_images(images), latents)
    assert not torch.equal(after.decode(latents), before.decode(latents))
    for name, weight in before.transformer.state_dict().items():
        assert torch.equal(after.transformer.state_dict()[name], weight)
    assert json.loads((tmp_path / "run" / "quality.json").read_text())["0.3"]["psnr"] > 0
