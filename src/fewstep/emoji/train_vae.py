"""Training of the micro VAE: a 16-channel ``AutoencoderKL`` with 8x downsampling, like Z-Image's."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from torch import Tensor, nn

from fewstep.core import seeds
from fewstep.core.method import Batch, Method, Shard, Trainable
from fewstep.data.images import grid
from fewstep.emoji.dataset import EmojiDataset
from fewstep.emoji.recipes import VAELossSettings, VAERecipe
from fewstep.models.components import load_component
from fewstep.models.family import get_family
from fewstep.models.vae import to_channels_last
from fewstep.training.run_dir import RunDir
from fewstep.training.trainer import Trainer


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


class VAEMethod(Method):
    """One trainable, the autoencoder: reconstruction plus KL."""

    def __init__(self, vae: AutoencoderKL, weights: VAELossSettings) -> None:
        self.vae, self.weights = vae, weights
        self.trainables = [Trainable("vae", vae, self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images: Tensor = batch
        with torch.set_grad_enabled(any(p.requires_grad for p in self.vae.encoder.parameters())):
            posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample
        reconstruction, pixel = reconstruction_loss(images, decoded.float(), self.weights)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return reconstruction + self.weights.kl * kl, {"pixel": pixel.detach(), "kl": kl.detach()}


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Set the config's shift and scale so that the latents of ``images`` have mean 0 and standard deviation 1."""
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(128)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def train(recipe: VAERecipe, run: RunDir) -> Path:
    """Train on all objects in the teacher's styles on all backgrounds, and save to ``<run>/vae``.

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
            load_component(Path(recipe.init), "vae", torch.float32, get_family("ZImagePipeline"))
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

    method = VAEMethod(vae, recipe.loss)
    trainer = Trainer(method, data, run, train=recipe.train, optim={"vae": recipe.optim}, preview=preview)
    trainer.fit()
    with trainer.ema_weights():
        if recipe.train_encoder:
            sample = [specs[i] for i in torch.randperm(len(specs), generator=generator)[:2048].tolist()]
            normalize_latents(vae, dataset.render(sample, generator) * 2 - 1)
        vae.save_pretrained(run.directory / "vae")
    return run.directory
