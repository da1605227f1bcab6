"""The micro VAE: a 16-channel ``AutoencoderKL`` that shrinks 8 times, as Z-Image's does."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from torch import Tensor, nn

from fewstep.core.method import Batch, Method, Trainable
from fewstep.data.images import grid
from fewstep.emoji.dataset import EmojiDataset
from fewstep.emoji.recipes import VaeLossSettings, VaeRecipe
from fewstep.models.components import load_component
from fewstep.models.family import get_family
from fewstep.models.vae import to_channels_last
from fewstep.training.run_dir import RunDir
from fewstep.training.trainer import Trainer


def build_vae(channels: list[int], layers_per_block: int, latent_channels: int, norm_num_groups: int) -> AutoencoderKL:
    """An ``AutoencoderKL`` of Z-Image's kind: no quantisation convolutions, a shift and a scale of the latents."""
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
            # residual branches start at 0, so that the network begins nearly linear: a little faster at first
            nn.init.zeros_(module.conv2.weight)
    return to_channels_last(vae)


def reconstruction_loss(images: Tensor, decoded: Tensor, weights: VaeLossSettings) -> tuple[Tensor, Tensor]:
    """Absolute and squared error of the pixels, and absolute error of their differences across and down: flat drawings
    live by their edges.

    Args:
        images, decoded: [B, 3, H, W] in [-1, 1].

    Returns:
        The weighted sum, and the mean absolute error of the pixels.
    """
    error = decoded - images
    pixel = error.abs().mean()
    edges = error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
    return weights.l1 * pixel + weights.l2 * error.square().mean() + weights.edge * edges, pixel


class VaeMethod(Method):
    """One trainable: reconstruction with a light KL term."""

    def __init__(self, vae: AutoencoderKL, weights: VaeLossSettings) -> None:
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
    """Write the shift and scale into the config that give the latents of ``images`` mean 0 and deviation 1."""
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(128)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def train(recipe: VaeRecipe, run: RunDir) -> Path:
    """Train on every thing in the teacher's styles, on every color; the style kept for LoRA training is not seen."""
    world = EmojiDataset.everything()
    concepts = world.concepts()
    core = {thing.code for thing in EmojiDataset.load().things}
    core_concepts = [c for c in concepts if world.things[c.thing].code in core]
    model = recipe.model
    torch.manual_seed(recipe.train.seed)
    vae = build_vae(model.block_out_channels, model.layers_per_block, model.latent_channels, model.norm_num_groups)
    if recipe.init is not None:
        vae = to_channels_last(
            load_component(Path(recipe.init), "vae", torch.float32, get_family("ZImagePipeline"))
        ).requires_grad_(True)
    vae.encoder.requires_grad_(recipe.train_encoder)

    def data(position: int) -> Tensor:
        generator = torch.Generator().manual_seed(recipe.train.seed * 1_000_003 + position)
        chosen = torch.rand(recipe.train.batch_size, 2, generator=generator).tolist()
        batch = [
            pool[int(place * len(pool))]
            for pool, place in ((core_concepts if kind < recipe.core_share else concepts, p) for kind, p in chosen)
        ]
        return (world.render(batch, generator) * 2 - 1).contiguous(memory_format=torch.channels_last)

    generator = torch.Generator().manual_seed(0)
    shown = world.render([concepts[i] for i in range(0, len(concepts), len(concepts) // 16)][:16], generator) * 2 - 1

    @torch.no_grad()
    def preview(step: int) -> Image.Image:
        decoded = vae.decode(vae.encode(shown).latent_dist.mode()).sample
        pairs = torch.stack([shown, decoded], dim=1).flatten(0, 1)
        return grid((pairs + 1) / 2, columns=8)

    method = VaeMethod(vae, recipe.loss)
    trainer = Trainer(method, data, run, train=recipe.train, optim={"vae": recipe.optim}, preview=preview)
    trainer.fit()
    with trainer.ema_weights():
        if recipe.train_encoder:
            sample = [concepts[i] for i in torch.randperm(len(concepts), generator=generator)[:2048].tolist()]
            normalize_latents(vae, world.render(sample, generator) * 2 - 1)
        vae.save_pretrained(run.directory / "vae")
    return run.directory
