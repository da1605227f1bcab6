"""Training of the micro VAE: a 16-channel ``AutoencoderKL`` with 8x downsampling, like Z-Image's."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from torch import Tensor, nn

from fewstep.atomic import atomic_folder, write_text
from fewstep.core import seeds
from fewstep.core.method import Batch, Method, Shard, Trainable
from fewstep.data.images import grid
from fewstep.emoji.dataset import EmojiDataset
from fewstep.emoji.patch_discriminator import PatchDiscriminator, adversarial_losses, discriminator_loss
from fewstep.emoji.recipes import AdversarialLossSettings, VAELossSettings, VAERecipe
from fewstep.emoji.vae_quality import measure_vae
from fewstep.models.components import component_folder, load_component
from fewstep.models.family import get_family
from fewstep.models.vae import to_channels_last
from fewstep.training.run_dir import RunDir
from fewstep.training.trainer import Trainer

SCALES = (0.5, 0.625, 0.75, 0.875, 1.0)  # of 8x8 latents, whole numbers of positions


def build_vae(channels: list[int], layers_per_block: int, latent_channels: int, norm_num_groups: int) -> AutoencoderKL:
    """An ``AutoencoderKL`` like Z-Image's: no quantization convolutions; shift and scale of the latents."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=latent_channels,
        block_out_channels=channels,
        layers_per_block=layers_per_block,
        norm_num_groups=norm_num_groups,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            # residual branches start at 0, which makes the network nearly linear at first: it trains a little faster
            nn.init.zeros_(module.conv2.weight)
    return to_channels_last(vae)


def reconstruction_loss(images: Tensor, decoded: Tensor, weights: VAELossSettings) -> tuple[Tensor, Tensor]:
    """Absolute and squared error of the pixels, and absolute error of the horizontal and vertical image gradients,
    since the edges carry most of the content of flat drawings.

    Args:
        images, decoded: [B, 3, H, W] in [-1, 1].

    Returns:
        The weighted sum, and the mean absolute error of the pixels.
    """
    error = decoded - images
    pixel = error.abs().mean()
    gradient = error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
    return weights.l1 * pixel + weights.l2 * error.square().mean() + weights.gradient_l1 * gradient, pixel


def adversarial_terms(
    network: PatchDiscriminator, images: Tensor, decoded: Tensor, weights: AdversarialLossSettings
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the adversarial and the feature matching loss, and both as metrics."""
    adversarial, matching = adversarial_losses(network, images, decoded)
    metrics = {"adversarial": adversarial.detach(), "feature_matching": matching.detach()}
    return weights.adversarial * adversarial + weights.feature_matching * matching, metrics


def add_latent_noise(latents: Tensor, largest: float) -> Tensor:
    """Latents [B, C, H, W] plus Gaussian noise, whose standard deviation relative to that of all latents is drawn for
    each image from [0, ``largest``] (noise-augmented decoding, as in arXiv 2510.11690, section 4.2)."""
    amount = largest * torch.rand(len(latents), 1, 1, 1, device=latents.device)
    return latents + amount * latents.detach().std() * torch.randn_like(latents)


def transform(tensor: Tensor, scale: float, quarter_turns: int) -> Tensor:
    """Images or latents [B, C, H, W], scaled and rotated."""
    if scale != 1:
        tensor = F.interpolate(tensor, scale_factor=scale, mode="bilinear", antialias=True)
    return torch.rot90(tensor, quarter_turns, (2, 3))


class VAEMethod(Method):
    """Two trainables, the autoencoder (reconstruction plus KL) and a patch discriminator of its images; the second only
    if a weight needs it.

    Args:
        latent_noise: see :func:`add_latent_noise`.
        equivariance: fraction of batches in which the decoded and the expected images are transformed: latents in the
            latent space, images in the pixel space (EQ-VAE, arXiv 2502.09509, equation 5).
    """

    def __init__(
        self, vae: AutoencoderKL, weights: AdversarialLossSettings, latent_noise: float = 0.0, equivariance: float = 0.0
    ) -> None:
        self.vae, self.weights = vae, weights
        self.latent_noise, self.equivariance = latent_noise, equivariance
        self.discriminator: PatchDiscriminator | None = None
        self.trainables = [Trainable("vae", vae, self.loss)]
        if weights.adversarial or weights.feature_matching:
            self.discriminator = PatchDiscriminator()
            self.trainables = [
                Trainable("vae", vae, self.loss, uses_collected=True),
                Trainable("discriminator", self.discriminator, self.compute_discriminator_loss, uses_collected=True),
            ]

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images in [-1, 1] and their reconstructions, both transformed in some batches, and the KL divergence."""
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and any(p.requires_grad for p in self.vae.encoder.parameters())
        ):
            posterior = self.vae.encode(images).latent_dist
        latents = posterior.sample()
        if self.latent_noise:
            latents = add_latent_noise(latents, self.latent_noise)
        drawn = torch.rand(3).tolist() if self.equivariance else [1.0]
        if drawn[0] < self.equivariance:
            scale, quarter_turns = SCALES[int(drawn[1] * len(SCALES))], int(4 * drawn[2])
            latents, images = (transform(tensor, scale, quarter_turns) for tensor in (latents, images))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return images, self.vae.decode(latents).sample.float(), kl

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, decoded, kl = self.reconstruct(batch)
        reconstruction, pixel = reconstruction_loss(images, decoded, self.weights)
        loss = reconstruction + self.weights.kl * kl
        metrics = {"pixel": pixel.detach(), "kl": kl.detach()}
        if self.discriminator is not None:
            terms, further = adversarial_terms(self.discriminator, images, decoded, self.weights)
            loss, metrics = loss + terms, metrics | further
        return loss, metrics

    def compute_discriminator_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.discriminator is not None
        with torch.no_grad():
            images, decoded, _ = self.reconstruct(batch)
        loss, accuracy = discriminator_loss(self.discriminator, images, decoded)
        return loss, {"accuracy": accuracy}


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Set the config's shift and scale so that the latents of ``images`` have mean 0 and standard deviation 1."""
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(128)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def train(recipe: VAERecipe, run: RunDir) -> Path:
    """Train on all objects in the teacher's styles on all backgrounds, and save to ``<run>/vae``; ``quality.json`` has
    the quality on test images (:func:`measure_vae`).

    The style reserved for LoRA training is not used.
    """
    dataset = EmojiDataset.load_all()
    specs = dataset.specs()
    core = {item.code for item in EmojiDataset.load().objects}
    core_specs = [spec for spec in specs if dataset.objects[spec.object].code in core]
    model = recipe.model
    torch.manual_seed(recipe.train.seed)
    vae = build_vae(model.block_out_channels, model.layers_per_block, model.latent_channels, model.norm_num_groups)
    if recipe.init is not None:
        vae = to_channels_last(
            load_component(component_folder(recipe.init), "vae", torch.float32, get_family("ZImagePipeline"))
        ).requires_grad_(True)
    vae.encoder.requires_grad_(recipe.train_encoder)

    def data(position: int, shard: Shard = Shard()) -> Tensor:  # noqa: B008  # frozen
        generator = seeds.generator("batch", recipe.train.seed, position)
        chosen = torch.rand(recipe.train.batch_size, 2, generator=generator).tolist()
        batch = [
            pool[int(place * len(pool))]
            for pool, place in ((core_specs if kind < recipe.core_fraction else specs, p) for kind, p in chosen)
        ]
        images = dataset.render(batch, generator)[shard.rows(len(batch))]
        return (images * 2 - 1).contiguous(memory_format=torch.channels_last)

    generator = torch.Generator().manual_seed(0)
    shown = dataset.render([specs[i] for i in range(0, len(specs), len(specs) // 16)][:16], generator) * 2 - 1

    @torch.no_grad()
    def preview(step: int) -> Image.Image:
        decoded = vae.decode(vae.encode(shown).latent_dist.mode()).sample
        pairs = torch.stack([shown, decoded], dim=1).flatten(0, 1)
        return grid((pairs + 1) / 2, columns=8)

    method = VAEMethod(vae, recipe.loss, recipe.latent_noise, recipe.equivariance)
    optim = {"vae": recipe.optim, "discriminator": recipe.discriminator_optim}
    trainer = Trainer(method, data, run, train=recipe.train, optim=optim, preview=preview)
    trainer.fit()
    with trainer.ema_weights():
        if recipe.train_encoder:
            sample = [specs[i] for i in torch.randperm(len(specs), generator=generator)[:2048].tolist()]
            normalize_latents(vae, dataset.render(sample, generator) * 2 - 1)
        with atomic_folder(run.directory / "vae") as aside:
            vae.save_pretrained(aside)
        vae.requires_grad_(False)
        family = get_family("ZImagePipeline")
        quality = measure_vae(
            lambda images: family.encode_images(vae, images), lambda latents: family.decode_latents(vae, latents)
        )
    write_text(run.directory / "quality.json", json.dumps(quality, indent=1) + "\n")
    return run.directory
