"""Training of the micro teacher: flow matching of a small Z-Image transformer on latents of the emoji dataset."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from PIL import Image
from torch import Tensor, nn

from fewstep.core import flow, seeds
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import flow_matching_loss
from fewstep.core.guidance import ClassifierFreeGuidance
from fewstep.core.method import Batch, Method, Shard, Trainable
from fewstep.core.samplers import sample_euler
from fewstep.data.images import grid
from fewstep.emoji.dataset import NUM_TEMPLATES, EmojiDataset
from fewstep.emoji.latents import build_bank
from fewstep.emoji.recipes import FlowMatchingRecipe, TransformerSettings
from fewstep.methods.models_setup import load_init
from fewstep.models.components import component_folder, load_component
from fewstep.models.consistency import check_components
from fewstep.models.family import get_family
from fewstep.models.generation_config import GenerationConfig
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.models.vae import to_channels_last
from fewstep.training.run_dir import RunDir
from fewstep.training.trainer import Trainer

IMAGE_SIZE = 64  # pixels per side
PREVIEW_IMAGES = 32


def build_transformer(settings: TransformerSettings, features: int, channels: int) -> ZImageTransformer2DModel:
    """A small Z-Image initialized for training: truncated normal weights; modulation and output weights of 0.

    Args:
        features: width of the prompt features.
        channels: channels of the latents.
    """
    model = ZImageTransformer2DModel(
        in_channels=channels,
        dim=settings.dim,
        n_layers=settings.n_layers,
        n_refiner_layers=settings.n_refiner_layers,
        n_heads=settings.n_heads,
        n_kv_heads=settings.n_heads,
        cap_feat_dim=features,
        axes_dims=list(settings.axes_dims),
        axes_lens=[1024, 512, 512],
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if "adaLN_modulation" in name or ("final_layer" in name and name.endswith("linear")):
                nn.init.zeros_(module.weight)
        if "adaLN_modulation" in name and isinstance(module, nn.Linear) and "final_layer" not in name:
            # with gates of tanh(0) = 0, no parameter of a block would have a gradient except those of its gates
            dim = module.out_features // 4
            nn.init.constant_(module.bias[dim : 2 * dim], 0.5)
            nn.init.constant_(module.bias[3 * dim :], 0.5)
    nn.init.normal_(model.x_pad_token, std=0.02)
    nn.init.normal_(model.cap_pad_token, std=0.02)
    return model


def draw_sigmas(count: int, mean: float, std: float, shift: float, device: torch.device | str = "cpu") -> Tensor:
    """Shifted logit-normal noise levels ``S(sigmoid(N(mean, std)))``, [count] (SD3, arXiv 2403.03206, 3.1)."""
    return flow.shift_sigma(torch.sigmoid(mean + std * torch.randn(count, device=device)), shift)


class FlowMatching(Method):
    """One trainable, the denoiser. A batch is (x0, encoded prompts); some of the prompts are the null prompt."""

    def __init__(self, denoiser: nn.Module, mean: float, std: float, shift: float) -> None:
        self.denoiser, self.mean, self.std, self.shift = denoiser, mean, std, shift
        self.trainables = [Trainable("teacher", denoiser, self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x0, prompts = batch
        sigma = draw_sigmas(len(x0), self.mean, self.std, self.shift, x0.device)
        each = flow_matching_loss(self.denoiser, x0, torch.randn_like(x0), sigma, prompts)
        noisy = sigma > 0.75
        parts = {"noisy": each[noisy], "clean": each[~noisy]}
        return each.mean(), {name: part.detach().mean() for name, part in parts.items() if len(part)}


def train(recipe: FlowMatchingRecipe, run: RunDir) -> Path:
    """Train on the training split, and save the whole model to ``<run>/model``."""
    dataset = EmojiDataset.load(recipe.data.num_objects)
    specs = dataset.specs("train")
    family = get_family("ZImagePipeline")
    vae = to_channels_last(load_component(component_folder(recipe.vae), "vae", torch.float32, family))
    text_folder = component_folder(recipe.text_encoder)
    text_encoder = load_component(text_folder, "text_encoder", torch.float32, family)
    tokenizer = load_component(text_folder, "tokenizer", family=family)
    check_components(text_folder, family, {"text_encoder": text_encoder, "tokenizer": tokenizer})
    torch.manual_seed(recipe.train.seed)
    transformer = build_transformer(recipe.model, text_encoder.config.hidden_size, vae.config.latent_channels)
    config = GenerationConfig(steps=50, guidance_scale=recipe.guidance_scale, height=IMAGE_SIZE, width=IMAGE_SIZE)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=recipe.shift)
    components = {
        "transformer": transformer, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer,
        "scheduler": scheduler,
    }  # fmt: skip
    model = TextToImagePipeline(family, components, config)
    if recipe.init is not None:
        load_init(model, recipe.init)

    file = run.directory / "latents.safetensors"
    bank = build_bank(dataset, specs, model.encode_images, recipe.data.augmentations_per_object, seed=2, file=file)
    encoded = model.encode([dataset.prompt(spec, template) for spec in specs for template in range(NUM_TEMPLATES)])
    null = model.encode([""])

    def data(position: int, shard: Shard = Shard()) -> tuple[Tensor, EncodedPrompts]:  # noqa: B008  # frozen
        generator = seeds.generator("batch", recipe.train.seed, position)
        size = recipe.train.batch_size
        chosen = torch.randint(len(specs), (size,), generator=generator)
        template = torch.randint(NUM_TEMPLATES, (size,), generator=generator)
        dropped = torch.rand(size, generator=generator) < recipe.prompt_dropout
        rows = shard.rows(size)
        described = torch.randint(len(specs), (size,), generator=generator)
        noisy = torch.rand(size, generator=generator) < recipe.caption_noise
        described = torch.where(noisy, described, chosen)
        prompts = replace_prompts(encoded[(described * NUM_TEMPLATES + template)[rows]], dropped[rows], null)
        return bank.draw([specs[i] for i in chosen.tolist()], generator)[rows], prompts

    shown = dataset.sample(PREVIEW_IMAGES, "validation")
    shown_prompts = model.encode([dataset.prompt(spec, i % NUM_TEMPLATES) for i, spec in enumerate(shown)])
    guided = ClassifierFreeGuidance(model.denoiser, null, 1 + recipe.guidance_scale)

    def preview(step: int) -> Image.Image:
        shape = model.latent_shape(IMAGE_SIZE, IMAGE_SIZE)
        noise = torch.randn(len(shown), *shape, generator=torch.Generator().manual_seed(0))
        return grid(
            model.decode(sample_euler(guided, noise, flow.get_sigmas(20, recipe.shift), shown_prompts)), columns=8
        )

    if recipe.compile:
        model.denoiser.compile_repeated_blocks()
    method = FlowMatching(model.denoiser, recipe.logit_mean, recipe.logit_std, recipe.shift)
    trainer = Trainer(method, data, run, train=recipe.train, optim={"teacher": recipe.optim}, preview=preview)
    trainer.fit()
    with trainer.ema_weights():
        return model.save(run.directory / "model")


def replace_prompts(prompts: EncodedPrompts, where: Tensor, by: EncodedPrompts) -> EncodedPrompts:
    """``prompts`` with those at ``where`` (bool [B]) replaced by the one prompt in ``by``."""
    padded = EncodedPrompts.concat([prompts, by])
    features = torch.where(where[:, None, None], padded.features[-1:], padded.features[:-1])
    return EncodedPrompts(features, torch.where(where, by.lengths, prompts.lengths))
