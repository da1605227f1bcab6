"""A text-to-image model in Z-Image's folder layout: loading, saving, and the parts put together."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from transformers import Qwen3Model

from fewstep import flow
from fewstep.errors import UserError
from fewstep.models import vae as vae_tools
from fewstep.models.fp8 import FP8, is_narrow, multiplies_in_8_bits, narrow
from fewstep.models.offload import offload_blocks
from fewstep.models.parts import PARTS, find, load_part, quiet
from fewstep.models.prompts import EncodedPrompts, PromptEncoder, PromptTooLong
from fewstep.models.zimage import PATCH, ZImageDenoiser

CARD = "fewstep.json"
TURBO_SHIFT = 3  # of Z-Image-Turbo's noise levels; Z-Image's is 6


class ModelCard(BaseModel):
    """How a model wants to be run: ``fewstep.json`` in its folder. diffusers does not read it."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(50, ge=1, description="Steps it was trained for, or is best sampled with.")
    guidance_scale: float = Field(0.0, ge=0, description="Best guidance as in cond + g (cond - null); 0 is none.")
    guidance_distilled: bool = Field(False, description="Guidance is inside already: more of it over-bakes.")
    sigmas: list[float] | None = Field(None, description="Its sigmas from 1 down, without the final 0.")
    sampler: str = Field("euler", description='"euler", or "renoise" between steps.')
    eta: float = Field(1.0, ge=0, le=1, description="Share of fresh noise in each step of the renoise sampler.")
    system_prompt: str = Field("", description="The system's turn before every prompt; empty is none.")
    teacher: str | None = Field(None, description="The model it was made from: a folder, or a shipped one's name.")
    height: int = Field(1024, ge=1, description="Pixels.")
    width: int = Field(1024, ge=1, description="Pixels.")


class TextToImage:
    """All parts of a model, and the few things one does with them."""

    def __init__(
        self,
        transformer: ZImageTransformer2DModel,
        vae: AutoencoderKL,
        text_encoder: Qwen3Model,
        tokenizer: Any,
        scheduler: FlowMatchEulerDiscreteScheduler,
        card: ModelCard,
    ) -> None:
        self.transformer, self.vae, self.text_encoder = transformer, vae, text_encoder
        self.tokenizer, self.scheduler, self.card = tokenizer, scheduler, card
        self.denoiser = ZImageDenoiser(transformer)
        self._rests = False
        self.encoder = PromptEncoder(tokenizer, text_encoder, card.system_prompt)

    @property
    def shift(self) -> float:
        """The shift of its noise levels (3 for Z-Image-Turbo)."""
        return float(self.scheduler.config["shift"])

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def to(self, device: torch.device | str) -> TextToImage:
        for module in (self.transformer, self.vae, self.text_encoder):
            module.to(device)  # type: ignore[arg-type]
        return self

    def at_size(self, side: int | None) -> None:
        """Square images of so many pixels a side from here on, where the caller of a method says nothing; None changes
        nothing."""
        if side is not None:
            self.card = self.card.model_copy(update={"height": side, "width": side})

    def rest(self) -> None:
        """From here on text encoder and autoencoder are in the CPU's memory, and come to the transformer's device only
        while they are asked."""
        for module in (self.text_encoder, self.vae):
            module.to("cpu")
        self._rests = True
        self.encoder.awake = lambda: self._awake(self.text_encoder)

    @contextmanager
    def _awake(self, module: nn.Module) -> Iterator[None]:
        """Inside, a part that rests is where the transformer is."""
        if self._rests:
            module.to(self.device)
        try:
            yield
        finally:
            if self._rests:
                module.to("cpu")

    def attend_by(self, backend: str) -> None:
        """Compute attention by one of diffusers' backends, for all models of this process.

        Raises:
            UserError: there is no such backend, or it does not run here.
        """
        try:
            with quiet():
                self.transformer.set_attention_backend(backend)
        except (ImportError, RuntimeError, ValueError) as error:
            raise UserError(f"attention {backend}: {str(error).splitlines()[0]}") from error

    def sigmas(self, steps: int) -> list[float]:
        """The noise levels of ``steps`` steps, from 1 down, without the final 0: the card's own where they fit."""
        if self.card.sigmas is not None and len(self.card.sigmas) == steps:
            return self.card.sigmas
        return flow.schedule(steps, self.shift)

    def encode(self, texts: Sequence[str], *, system: str | None = None, thinking: str = "") -> EncodedPrompts:
        """Encoded prompts, each encoded once; "" is the null prompt.

        Args:
            system: the system's turn before each; None is the card's, "" is none.
            thinking: what the model is to have thought of these prompts already.

        Raises:
            UserError: a prompt is too long.
        """
        try:
            return self.encoder(texts, system=system, thinking=thinking)
        except PromptTooLong as error:
            raise UserError(str(error)) from error

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, rows and columns of the latent of an image.

        Raises:
            UserError: a side is no multiple of what a patch of latents covers (16 pixels for Z-Image).
        """
        unit = vae_tools.downscale(self.vae)
        for name, side in (("height", height), ("width", width)):
            if side < 1 or side % (unit * PATCH):
                raise UserError(f"{name} {side} is not a multiple of {unit * PATCH}")
        return self.transformer.in_channels, height // unit, width // unit

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> latents."""
        with self._awake(self.vae):
            return vae_tools.encode_images(self.vae, images)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> [B, 3, H, W] in [0, 1]."""
        with self._awake(self.vae):
            return vae_tools.decode_latents(self.vae, latents)

    def save(self, folder: str | Path, write: Callable[[Path], object] | None = None) -> Path:
        """Write a folder that ``diffusers.ZImagePipeline.from_pretrained`` opens. It appears whole or not at all.

        Args:
            write: writes the transformer into its own folder; unset, it is written as it is.

        Raises:
            UserError: its weights are in 8 bits, which such a folder cannot hold.
        """
        if write is None and is_narrow(self.transformer):
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
        with quiet():
            pipeline.save_config(draft)
            for name in PARTS:
                if name == "transformer" and write is not None:
                    write(draft / name)
                else:
                    getattr(self, name).save_pretrained(draft / name)
        (draft / CARD).write_text(self.card.model_dump_json(indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
        return folder


def read_card(folder: Path) -> ModelCard:
    """``fewstep.json``; of a folder that others wrote, how its like is run, with a warning.

    Raises:
        UserError: the file says what it cannot mean.
    """
    file = folder / CARD
    if not file.exists():
        return _guessed_card(folder)
    try:
        return ModelCard.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"{file}: {wrong}") from error
    except ValueError as error:  # not JSON, not UTF-8
        raise UserError(f"{file}: {error}") from error


def _guessed_card(folder: Path) -> ModelCard:
    """A folder whose noise levels have Z-Image-Turbo's shift is taken for a model of its kind, any other for one of
    Z-Image's."""
    shift = load_part(folder, "scheduler").config["shift"]
    card, kind = ModelCard(guidance_scale=4.0), "Z-Image"
    if shift == TURBO_SHIFT:
        card, kind = ModelCard(steps=8), "Z-Image-Turbo"
    warnings.warn(
        f"{folder}: no {CARD}; by its shift of {shift:g} it is run like {kind}, with {card.steps} steps and guidance "
        f"{card.guidance_scale:g} where nothing else is said",
        stacklevel=3,
    )
    return card


def load(
    path_or_name: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    offload: Literal["none", "parts", "blocks"] = "none",
) -> TextToImage:
    """Load a model for inference: all its weights frozen, in eval mode.

    Args:
        path_or_name: a folder in diffusers' layout, or "micro", the shipped teacher of the emoji world.
        dtype: of the weights: fp32, bf16, or ``torch.float8_e4m3fn`` for the matrices of the transformer's blocks (the
            rest is bf16 then, and products are in 8 bits where the device is fast at them). Unset, each part's own:
            bf16 where it is stored so, else fp32.
        offload: "parts": only the transformer is on the device (:meth:`TextToImage.rest`); "blocks": of the transformer
            only the block that speaks.

    Raises:
        UserError: no model there, a file of it is missing or corrupt, or the weights are wanted in fp16.
    """
    folder = find(path_or_name)
    narrowed = dtype == FP8
    parts = {name: load_part(folder, name, torch.bfloat16 if narrowed else dtype) for name in PARTS}
    if narrowed:
        narrow(parts["transformer"], products=multiplies_in_8_bits(device))
    vae_tools.as_channels_last(parts["vae"])
    model = TextToImage(**parts, card=read_card(folder))
    if offload == "none":
        return model.to(device)
    if offload == "blocks":
        offload_blocks(model.denoiser, device)
    else:
        model.transformer.to(device)
    model.rest()
    return model


def with_parts_of(transformer: ZImageTransformer2DModel, path_or_name: str | Path) -> TextToImage:
    """A model of this transformer and all the other parts of another, on the CPU. Errors as for :func:`load`."""
    folder = find(path_or_name)
    others = {name: load_part(folder, name) for name in PARTS if name != "transformer"}
    vae_tools.as_channels_last(others["vae"])
    return TextToImage(transformer, **others, card=read_card(folder))


def load_encoder(
    path_or_name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> PromptEncoder:
    """The text encoder of a model with its tokenizer alone. Arguments and errors as for :func:`load`."""
    folder = find(path_or_name)
    text_encoder = load_part(folder, "text_encoder", dtype).to(device)
    tokenizer = load_part(folder, "tokenizer")
    return PromptEncoder(tokenizer, text_encoder, read_card(folder).system_prompt if (folder / CARD).exists() else "")
