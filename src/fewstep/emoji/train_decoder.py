"""Training of a model's decoder on the inexact latents that its transformer generates.

A decoder that was trained on encoded images alone garbles latents that are slightly off, as generated ones are. Here
half of the latents have Gaussian noise on them (arXiv 2510.11690, section 4.2), and half are the transformer's data
predictions at a random noise level. The target is the real image; a patch discriminator keeps edges sharp. The encoder
is unchanged, and so are the latents: the transformer and everything distilled from it stay valid.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fewstep.atomic import write_text
from fewstep.core import flow, seeds
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import predict_x0
from fewstep.core.method import Batch, Method, Shard, Trainable
from fewstep.data.images import grid
from fewstep.emoji.dataset import NUM_TEMPLATES, EmojiDataset
from fewstep.emoji.patch_discriminator import PatchDiscriminator, discriminator_loss
from fewstep.emoji.recipes import AdversarialLossSettings, DecoderRecipe
from fewstep.emoji.train_vae import add_latent_noise, adversarial_terms, reconstruction_loss
from fewstep.emoji.vae_quality import measure_vae
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.models.vae import decode_unclipped
from fewstep.training.run_dir import RunDir
from fewstep.training.trainer import Trainer

PREVIEW_IMAGES = 16
PREVIEW_SIGMA = 0.4


@torch.no_grad()
def predicted_latents(
    model: TextToImagePipeline, latents: Tensor, largest_sigma: float, prompts: EncodedPrompts
) -> Tensor:
    """The transformer's data predictions for real latents [B, C, H, W] at noise levels from U(0, ``largest_sigma``)."""
    sigma = largest_sigma * torch.rand(len(latents), device=latents.device)
    noisy = flow.add_noise(latents, sigma, torch.randn_like(latents))
    return predict_x0(model.denoiser, noisy, sigma, prompts).to(latents.dtype)


class DecoderMethod(Method):
    """Two trainables, the decoder and a patch discriminator of its images; the second only if a weight needs it.

    A batch is (images [B, 3, H, W] in [0, 1], encoded prompts).

    Args:
        latent_noise: of the first half of a batch, see :func:`add_latent_noise`.
        largest_sigma: of the second half, see :func:`predicted_latents`.
    """

    def __init__(
        self, model: TextToImagePipeline, weights: AdversarialLossSettings, latent_noise: float, largest_sigma: float
    ) -> None:
        self.model, self.weights = model, weights
        self.latent_noise, self.largest_sigma = latent_noise, largest_sigma
        self.discriminator: PatchDiscriminator | None = None
        self.trainables = [Trainable("vae", model.vae, self.loss, uses_collected=True)]
        if weights.adversarial or weights.feature_matching:
            self.discriminator = PatchDiscriminator()
            each = Trainable("discriminator", self.discriminator, self.compute_discriminator_loss, uses_collected=True)
            self.trainables.append(each)

    def collect(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The images in [-1, 1] and their inexact latents."""
        images, prompts = batch
        half = len(images) // 2
        latents = self.model.encode_images(images)
        predicted = predicted_latents(self.model, latents[half:], self.largest_sigma, prompts[half:])
        return images * 2 - 1, torch.cat([add_latent_noise(latents[:half], self.latent_noise), predicted])

    def loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images, latents = batch
        decoded = decode_unclipped(self.model.vae, latents)
        loss, pixel = reconstruction_loss(images, decoded, self.weights)
        off = (decoded - images)[len(images) // 2 :].abs().mean()
        metrics = {"pixel": pixel.detach(), "pixel_predicted": off.detach()}
        if self.discriminator is not None:
            terms, further = adversarial_terms(self.discriminator, images, decoded, self.weights)
            loss, metrics = loss + terms, metrics | further
        return loss, metrics

    def compute_discriminator_loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.discriminator is not None
        images, latents = batch
        with torch.no_grad():
            decoded = decode_unclipped(self.model.vae, latents)
        loss, accuracy = discriminator_loss(self.discriminator, images, decoded.float())
        return loss, {"accuracy": accuracy}


def train(recipe: DecoderRecipe, run: RunDir) -> Path:
    """Train on the core objects' training split, and save the whole model to ``<run>/model``; ``quality.json`` has the
    quality of its autoencoder on test images."""
    dataset = EmojiDataset.load()
    specs = dataset.specs("train")
    torch.manual_seed(recipe.train.seed)
    model = load(recipe.init, "cpu")
    model.vae.decoder.requires_grad_(True)
    encoded = model.encode([dataset.prompt(spec, index % NUM_TEMPLATES) for index, spec in enumerate(specs)])

    def data(position: int, shard: Shard = Shard()) -> tuple[Tensor, EncodedPrompts]:  # noqa: B008  # frozen
        generator = seeds.generator("batch", recipe.train.seed, position)
        chosen = torch.randint(len(specs), (recipe.train.batch_size,), generator=generator)
        rows = shard.rows(len(chosen))
        return dataset.render([specs[i] for i in chosen.tolist()], generator)[rows], encoded[chosen[rows]]

    shown = dataset.sample(PREVIEW_IMAGES, "validation")
    images = dataset.render(shown, torch.Generator().manual_seed(0))
    prompts = model.encode([dataset.prompt(spec) for spec in shown])

    @torch.no_grad()
    def preview(step: int) -> Image.Image:
        latents = model.encode_images(images)
        sigma = torch.full((len(latents),), PREVIEW_SIGMA)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        predicted = predict_x0(model.denoiser, flow.add_noise(latents, sigma, noise), sigma, prompts)
        return grid(torch.stack([images, model.decode(latents), model.decode(predicted)], 1).flatten(0, 1), columns=6)

    method = DecoderMethod(model, recipe.loss, recipe.latent_noise, recipe.largest_sigma)
    optim = {"vae": recipe.optim, "discriminator": recipe.discriminator_optim}
    trainer = Trainer(method, data, run, train=recipe.train, optim=optim, preview=preview)
    trainer.fit()
    with trainer.ema_weights():
        folder = model.save(run.directory / "model")
        quality = measure_vae(model.encode_images, model.decode)
    write_text(run.directory / "quality.json", json.dumps(quality, indent=1) + "\n")
    return folder
