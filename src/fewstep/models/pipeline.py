"""A text-to-image model in Z-Image's folder layout: loading, saving, and the parts put together."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen3Model

from fewstep.core import flow
from fewstep.core.conditioning import EncodedPrompts
from fewstep.errors import UserError
from fewstep.models import vae as vae_tools
from fewstep.models.components import COMPONENTS, load_component, resolve_model, silence_loggers
from fewstep.models.generation_config import GENERATION_CONFIG, GenerationConfig, load_generation_config
from fewstep.models.offload import offload_blocks
from fewstep.models.quantize import FP8, is_fp8, quantize_fp8_, supports_fp8_matmul
from fewstep.models.text import PromptEncoder, PromptTooLong
from fewstep.models.zimage.denoiser import PATCH, ZImageDenoiser


class TextToImagePipeline:
    """All parts of a model, and the few things one does with them."""

    def __init__(
        self,
        transformer: ZImageTransformer2DModel,
        vae: AutoencoderKL,
        text_encoder: Qwen3Model,
        tokenizer: Any,
        scheduler: FlowMatchEulerDiscreteScheduler,
        card: GenerationConfig,
    ) -> None:
        self.transformer, self.vae, self.text_encoder = transformer, vae, text_encoder
        self.tokenizer, self.scheduler, self.generation_config = tokenizer, scheduler, card
        self.denoiser = ZImageDenoiser(transformer)
        self._offloaded = False
        self.encoder = PromptEncoder(tokenizer, text_encoder, card.system_prompt)

    @property
    def shift(self) -> float:
        """The shift of its noise levels (3 for Z-Image-Turbo)."""
        return float(self.scheduler.config["shift"])

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def to(self, device: torch.device | str) -> TextToImagePipeline:
        for module in (self.transformer, self.vae, self.text_encoder):
            module.to(device)  # type: ignore[arg-type]
        return self

    def set_resolution(self, side: int | None) -> None:
        """Square images of so many pixels a side from here on, where the caller of a method says nothing; None changes
        nothing."""
        if side is not None:
            self.generation_config = self.generation_config.model_copy(update={"height": side, "width": side})

    def enable_model_cpu_offload(self) -> None:
        """From here on text encoder and autoencoder are in the CPU's memory, and come to the transformer's device only
        while they are asked."""
        for module in (self.text_encoder, self.vae):
            module.to("cpu")
        self._offloaded = True
        self.encoder.on_device = lambda: self._on_device(self.text_encoder)

    @contextmanager
    def _on_device(self, module: nn.Module) -> Iterator[None]:
        """Inside, a part that rests is where the transformer is."""
        if self._offloaded:
            module.to(self.device)
        try:
            yield
        finally:
            if self._offloaded:
                module.to("cpu")

    def set_attention_backend(self, backend: str) -> None:
        """Compute attention by one of diffusers' backends, for all models of this process.

        Raises:
            UserError: there is no such backend, or it does not run here.
        """
        try:
            with silence_loggers():
                self.transformer.set_attention_backend(backend)
        except (ImportError, RuntimeError, ValueError) as error:
            raise UserError(f"attention {backend}: {str(error).splitlines()[0]}") from error

    def sigmas(self, steps: int) -> list[float]:
        """The noise levels of ``steps`` steps, from 1 to the terminal 0: ``steps + 1`` numbers; those of the generation
        config where it has as many."""
        sigmas = self.generation_config.sigmas
        if sigmas is not None and len(sigmas) == steps + 1:
            return sigmas
        return flow.get_sigmas(steps, self.shift)

    def encode(self, texts: Sequence[str], *, system: str | None = None, assistant_prefix: str = "") -> EncodedPrompts:
        """Encoded prompts, each encoded once; "" is the null prompt.

        Args:
            system: the system's turn before each; None is the card's, "" is none.
            assistant_prefix: what the model is to have thought of these prompts already.

        Raises:
            UserError: a prompt is too long.
        """
        try:
            return self.encoder(texts, system=system, assistant_prefix=assistant_prefix)
        except PromptTooLong as error:
            raise UserError(str(error)) from error

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, rows and columns of the latent of an image.

        Raises:
            UserError: a side is no multiple of what a patch of latents covers (16 pixels for Z-Image).
        """
        unit = vae_tools.vae_scale_factor(self.vae)
        for name, side in (("height", height), ("width", width)):
            if side < 1 or side % (unit * PATCH):
                raise UserError(f"{name} {side} is not a multiple of {unit * PATCH}")
        return self.transformer.in_channels, height // unit, width // unit

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> latents."""
        with self._on_device(self.vae):
            return vae_tools.encode_images(self.vae, images)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> [B, 3, H, W] in [0, 1]."""
        with self._on_device(self.vae):
            return vae_tools.decode_latents(self.vae, latents)

    def save(self, folder: str | Path, write: Callable[[Path], object] | None = None) -> Path:
        """Write a folder that ``diffusers.ZImagePipeline.from_pretrained`` opens. It appears whole or not at all.

        Args:
            write: writes the transformer into its own folder; unset, it is written as it is.

        Raises:
            UserError: its weights are in 8 bits, which such a folder cannot hold.
        """
        if write is None and is_fp8(self.transformer):
            raise UserError(f"{folder}: weights in 8 bits cannot be saved as a folder; load the model in bf16")
        folder = Path(folder)
        draft = folder.with_name(f".{folder.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        pipeline = ZImagePipeline(
            scheduler=self.scheduler,
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            transformer=self.transformer,
        )
        with silence_loggers():
            pipeline.save_config(draft)
            for name in COMPONENTS:
                if name == "transformer" and write is not None:
                    write(draft / name)
                else:
                    getattr(self, name).save_pretrained(draft / name)
        (draft / GENERATION_CONFIG).write_text(
            self.generation_config.model_dump_json(indent=2) + "\n", encoding="utf-8"
        )
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
        return folder


def load(
    path_or_name: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    offload: Literal["none", "model", "group"] = "none",
) -> TextToImagePipeline:
    """Load a model for inference: all its weights frozen, in eval mode.

    Args:
        path_or_name: a folder in diffusers' layout, or "micro", the shipped teacher of the emoji world.
        dtype: of the weights: fp32, bf16, or ``torch.float8_e4m3fn`` for the matrices of the transformer's blocks (the
            rest is bf16 then, and products are in 8 bits where the device is fast at them). Unset, each part's own:
            bf16 where it is stored so, else fp32.
        offload: "model": only the transformer is on the device (:meth:`TextToImage.rest`); "group": of the transformer
            only the block that speaks.

    Raises:
        UserError: no model there, a file of it is missing or corrupt, or the weights are wanted in fp16.
    """
    folder = resolve_model(path_or_name)
    narrowed = dtype == FP8
    parts = {name: load_component(folder, name, torch.bfloat16 if narrowed else dtype) for name in COMPONENTS}
    if narrowed:
        quantize_fp8_(parts["transformer"], products=supports_fp8_matmul(device))
    vae_tools.to_channels_last(parts["vae"])
    model = TextToImagePipeline(**parts, card=load_generation_config(folder))
    if offload == "none":
        return model.to(device)
    if offload == "group":
        offload_blocks(model.denoiser, device)
    else:
        model.transformer.to(device)
    model.enable_model_cpu_offload()
    return model


def with_components_from(transformer: ZImageTransformer2DModel, path_or_name: str | Path) -> TextToImagePipeline:
    """A model of this transformer and all the other parts of another, on the CPU. Errors as for :func:`load`."""
    folder = resolve_model(path_or_name)
    others = {name: load_component(folder, name) for name in COMPONENTS if name != "transformer"}
    vae_tools.to_channels_last(others["vae"])
    return TextToImagePipeline(transformer, **others, card=load_generation_config(folder))


def load_prompt_encoder(
    path_or_name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> PromptEncoder:
    """The text encoder of a model with its tokenizer alone. Arguments and errors as for :func:`load`."""
    folder = resolve_model(path_or_name)
    text_encoder = load_component(folder, "text_encoder", dtype).to(device)
    tokenizer = load_component(folder, "tokenizer")
    return PromptEncoder(
        tokenizer,
        text_encoder,
        load_generation_config(folder).system_prompt if (folder / GENERATION_CONFIG).exists() else "",
    )
