"""The micro autoencoder's training: noise on latents, equivariance, quality."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.config.load import load_recipe
from fewstep.emoji import train_vae, vae_quality
from fewstep.emoji.recipes import AdversarialLossSettings
from fewstep.emoji.train_vae import SCALES, VAEMethod, add_latent_noise, build_vae, transform
from fewstep.emoji.vae_quality import measure_vae, psnr
from fewstep.models.components import load_component
from fewstep.models.family import get_family
from fewstep.training.run_dir import RunDir


def test_latent_noise_is_relative_to_the_latents_and_differs_between_images() -> None:
    latents = 3 * torch.randn(400, 4, 8, 8)
    added = (add_latent_noise(latents, 0.5) - latents).flatten(1).std(1) / latents.std()
    assert added.max() == pytest.approx(0.5, abs=0.05)
    assert added.mean() == pytest.approx(0.25, abs=0.03)
    assert added.min() < 0.05


def test_transform_of_latents_matches_that_of_images() -> None:
    """An averaging encoder commutes with the transformation."""
    images = torch.rand(2, 3, 64, 64)
    for scale in SCALES:
        turned = transform(images, scale, 1)
        assert turned.shape[-1] == round(64 * scale)
        assert transform(F.avg_pool2d(images, 8), scale, 1).shape[-1] == round(8 * scale)
    torch.testing.assert_close(F.avg_pool2d(transform(images, 1.0, 3), 8), transform(F.avg_pool2d(images, 8), 1.0, 3))
    torch.testing.assert_close(F.avg_pool2d(transform(torch.ones(1, 3, 64, 64), 0.5, 2), 8), torch.ones(1, 3, 4, 4))


def test_equivariant_batches_train_the_encoder_at_every_scale() -> None:
    vae = build_vae([8, 8, 16, 16], 1, 16, 4)
    method = VAEMethod(vae, AdversarialLossSettings(), latent_noise=0.3, equivariance=1.0)
    for _ in range(6):
        vae.zero_grad()
        loss, _ = method.loss(torch.rand(2, 3, 64, 64) * 2 - 1)
        loss.backward()
        assert vae.encoder.conv_in.weight.grad.abs().sum() > 0


def test_each_network_is_trained_by_its_own_loss() -> None:
    vae = build_vae([8, 8, 16, 16], 1, 16, 4)
    method = VAEMethod(vae, AdversarialLossSettings(adversarial=0.1, feature_matching=0.1), equivariance=0.5)
    assert [part.name for part in method.trainables] == ["vae", "discriminator"]
    images, discriminator = torch.rand(2, 3, 64, 64) * 2 - 1, method.discriminator
    assert discriminator is not None
    loss, metrics = method.loss(images)
    loss.backward()
    assert {"adversarial", "feature_matching"} <= metrics.keys()
    assert vae.encoder.conv_in.weight.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in discriminator.parameters())
    vae.zero_grad()
    loss, _ = method.compute_discriminator_loss(images)
    loss.backward()
    assert all(weight.grad is None for weight in vae.parameters())
    assert discriminator.out.weight.grad is not None


def test_no_discriminator_unless_a_weight_needs_it() -> None:
    method = VAEMethod(build_vae([8, 8, 16, 16], 1, 16, 4), AdversarialLossSettings())
    assert [part.name for part in method.trainables] == ["vae"]


def test_psnr() -> None:
    images = torch.zeros(2, 3, 4, 4)
    assert psnr(images, images + 0.1) == pytest.approx(20, abs=1e-3)


def test_quality_falls_with_noise_on_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_quality, "LATENT_NOISE", (0.0, 1.0))

    def identity(tensor: Tensor) -> Tensor:
        return tensor

    quality = measure_vae(identity, identity, count=16)
    assert quality["0"]["nearest_real_acc"] > 0.9 > 0.5 > quality["1"]["nearest_real_acc"]
    assert quality["0"]["sharpness"] == pytest.approx(1)
    assert quality["0"]["fd_real"] < quality["1"]["fd_real"]
    assert quality["0"]["psnr"] > 60 > 15 > quality["1"]["psnr"]


def test_recipe_trains_and_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_vae, "measure_vae", partial(measure_vae, count=4))
    overrides = ["train.steps=2", "train.batch_size=2", "model.block_out_channels=[8,8,16,16]", "train.precision=fp32"]
    overrides += ["loss.adversarial=0.01", "loss.feature_matching=0.1"]
    recipe = load_recipe("micro-vae-robust", overrides)
    with RunDir(tmp_path / "run", recipe) as run:
        assert train_vae.train(recipe, run) == tmp_path / "run"
    assert "discriminator/accuracy" in (tmp_path / "run" / "metrics.jsonl").read_text()
    quality = json.loads((tmp_path / "run" / "quality.json").read_text())
    assert quality["0"].keys() == {"psnr", "nearest_real_acc", "sharpness", "fd_real"}
    vae = load_component(tmp_path / "run", "vae", torch.float32, get_family("ZImagePipeline"))
    assert vae.config.scaling_factor != 1.0
