"""A model family of a few lines that has nothing in common with Z-Image: proves that nothing else assumes Z-Image.

Its transformer is two residual layers on single latent pixels, its latents are [3, 1, H/4, W/4] (a clip of one frame),
its autoencoder averages pixels, its text encoder embeds bytes, and it stores components under its own class name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ConfigMixin, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import MIDDLE
from fewstep.models.block import TransformerBlock
from fewstep.models.denoiser import TransformerDenoiser
from fewstep.models.family import Components, LoadingInfo, ModelFamily
from fewstep.models.generation_config import GenerationConfig
from fewstep.models.key_layout import KeyLayout
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.models.text import PromptEncoder


def residual(block: Any, x: Tensor, condition: Tensor) -> Tensor:
    return x + block.outer(torch.tanh(block.inner(x) + condition[:, None]))


class FakeBlock(TransformerBlock):
    def __init__(self, dim: int) -> None:
        super().__init__(residual)
        self.inner, self.outer = nn.Linear(dim, dim), nn.Linear(dim, dim)


class FakeTransformer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, channels: int = 3, dim: int = 8) -> None:
        super().__init__()
        self.embed, self.prompt = nn.Linear(channels + 1, dim), nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(FakeBlock(dim) for _ in range(2))
        self.final = nn.Linear(dim, channels)


class FakeVAE(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, factor: int = 4) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))


class FakeTextEncoder(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, dim)


class FakeTokenizer:
    """Splits text into bytes; stored as one file."""

    def __call__(self, texts: Sequence[str]) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[list(text.encode()) for text in texts])

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "tokenizer.json").write_text('{"tokens": "bytes"}')


class BytePromptEncoder(PromptEncoder):
    def template(self, text: str, *, system: str | None = None, assistant_prefix: str = "") -> str:
        return f"{self.system if system is None else system}|{text}|{assistant_prefix}"

    def encode_uncached(
        self, texts: Sequence[str], *, system: str | None = None, assistant_prefix: str = ""
    ) -> list[Tensor]:
        chats = [self.template(text, system=system, assistant_prefix=assistant_prefix) for text in texts]
        return [self.text_encoder.bytes(torch.tensor(list(chat.encode()))) for chat in chats]


class FakeDenoiser(TransformerDenoiser):
    def forward(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        tokens = self._tokens(x, sigma, prompts, len(self.transformer.blocks))
        return self.transformer.final(tokens).transpose(1, 2).reshape(x.shape).float()

    @property
    def feature_dim(self) -> int:
        return self.transformer.embed.out_features

    def features(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts, depths: Sequence[float] = MIDDLE) -> Tensor:
        counts = [math.ceil(depth * len(self.transformer.blocks)) for depth in depths]
        return torch.cat([self._tokens(x, sigma, prompts, count).float() for count in counts], dim=-1)

    def _tokens(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts, depth: int) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)
        levels = sigma[:, None, None].expand(-1, pixels.shape[1], 1)
        tokens = self.transformer.embed(torch.cat([pixels, levels], dim=-1))
        condition = self.transformer.prompt(prompts.features.sum(dim=1) / prompts.lengths[:, None])
        for block in self.transformer.blocks[:depth]:
            tokens = block(tokens, condition)
        return tokens


class FakeFamily(ModelFamily):
    pipeline_class = "FakeVideoPipeline"
    architecture = "fake-video"
    patch_size = 1
    lora_target_modules = ("inner",)
    quantizable_modules = ("outer",)
    key_layouts = {"flat": KeyLayout(renamed={"blocks.": "b."})}  # noqa: RUF012
    classes = {"transformer": FakeTransformer, "vae": FakeVAE, "text_encoder": FakeTextEncoder}  # noqa: RUF012

    def load_module(self, name: str, path: Path, dtype: Any) -> tuple[nn.Module, LoadingInfo]:
        return self.classes[name].from_pretrained(
            path, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        )

    def load_other(self, name: str, path: Path) -> Any:
        if name == "scheduler":
            return FlowMatchEulerDiscreteScheduler.from_pretrained(path)
        assert json.loads((path / "tokenizer.json").read_text()) == {"tokens": "bytes"}
        return FakeTokenizer()

    def build(self, name: str, config: Mapping[str, Any]) -> nn.Module:
        return self.classes[name].from_config(dict(config))

    def write_index(self, components: Components, folder: Path, config: GenerationConfig) -> None:
        (folder / "model_index.json").write_text(json.dumps({"_class_name": self.pipeline_class}))

    def write_lora(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        folder.mkdir(parents=True)
        save_file(dict(weights), folder / "lora.safetensors")

    def denoiser(self, transformer: Any) -> FakeDenoiser:
        return FakeDenoiser(transformer)

    def prompt_encoder(self, components: Components, system_prompt: str = "") -> PromptEncoder:
        return BytePromptEncoder(components["tokenizer"], components["text_encoder"], system_prompt)

    def prompt_features(self, components: Components) -> int:
        return int(components["transformer"].config["dim"])

    def latent_multiple(self, components: Components) -> int:
        return int(components["vae"].config["factor"])

    def latent_shape(self, components: Components, height: int, width: int) -> tuple[int, ...]:
        factor = self.latent_multiple(components)
        return 3, 1, height // factor, width // factor

    def infer_generation_config(self, components: Components, folder: Path) -> tuple[GenerationConfig, str]:
        return GenerationConfig(steps=3, height=16, width=16), "FakeVideo"

    def encode_images(self, vae: Any, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images * 2 - 1, vae.config["factor"])[:, :, None] * vae.gain

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        images = (latents[:, :, 0] / vae.gain).repeat_interleave(vae.config["factor"], 2)
        return (images.repeat_interleave(vae.config["factor"], 3) / 2 + 0.5).clamp(0, 1)


FAKE = FakeFamily()


def fake_pipeline() -> TextToImagePipeline:
    """A fake model with random weights."""
    torch.manual_seed(0)
    components = {
        "transformer": FakeTransformer(),
        "text_encoder": FakeTextEncoder(),
        "vae": FakeVAE(),
        "tokenizer": FakeTokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=2.0),
    }
    for name in FAKE.modules:
        components[name].eval().requires_grad_(False)
    return TextToImagePipeline(FAKE, components, GenerationConfig(steps=4, guidance_scale=1.0, height=16, width=24))
