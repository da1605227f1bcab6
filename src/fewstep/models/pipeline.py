"""A text-to-image model of any family: its components, loading, saving, encoding and decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.atomic import atomic_folder
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.device import AUTO, log_device, resolve_device
from fewstep.core.precision import warn_if_weights_are_emulated
from fewstep.errors import UserError
from fewstep.models.ahead_of_time import check_package, load_package
from fewstep.models.attention_backends import use_attention_backend
from fewstep.models.components import load_component, resolve_model, silence_loggers
from fewstep.models.consistency import check_components
from fewstep.models.family import Components, ModelFamily, resolve_family
from fewstep.models.frames import latent_frames
from fewstep.models.generation_config import GENERATION_CONFIG, GenerationConfig, load_generation_config
from fewstep.models.lora.merge import merge_, open_loras
from fewstep.models.offload import has_offloaded_blocks, offload_blocks
from fewstep.models.other_vae import load_other_vae
from fewstep.models.quantize import FP8, is_fp8, quantize_fp8_, supports_fp8_matmul, warn_without_fp8_matmul
from fewstep.models.replaceable import check_replaceable
from fewstep.models.step_adapters import StepAdapterDenoiser, add_step_loras, check_one_transformer
from fewstep.models.vae import to_channels_last


class TextToImagePipeline:
    """A model with all its components.

    Attributes:
        components: by the family's names; "transformer", "text_encoder", "vae", "tokenizer" and "scheduler" are
            attributes too.
        denoiser: the transformer as a denoiser.
        encoder: the prompt encoder.
        folder: that it was loaded from; None if it was not.
    """

    folder: Path | None = None

    def __init__(self, family: ModelFamily, components: Components, generation_config: GenerationConfig) -> None:
        self.family, self.components, self.generation_config = family, dict(components), generation_config
        self.denoiser = family.denoiser(components["transformer"])
        self.encoder = family.prompt_encoder(components, generation_config.system_prompt)
        self._offloaded = False

    @property
    def transformer(self) -> Any:
        return self.components["transformer"]

    @property
    def text_encoder(self) -> Any:
        return self.components["text_encoder"]

    @property
    def vae(self) -> Any:
        return self.components["vae"]

    @property
    def tokenizer(self) -> Any:
        return self.components["tokenizer"]

    @property
    def scheduler(self) -> Any:
        return self.components["scheduler"]

    @property
    def shift(self) -> float:
        """The shift of its noise levels (3 for Z-Image-Turbo)."""
        return self.family.shift(self.components)

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def to(self, device: torch.device | str) -> TextToImagePipeline:
        """Move all modules, or the transformer alone where the others are offloaded. Raises: UserError if there is no
        such device, or blocks are offloaded, which a move would end."""
        device = resolve_device(device)
        if has_offloaded_blocks(self.transformer):
            raise UserError(f"to {device}: the blocks of this model are offloaded; load it again without offload")
        for name in self.family.modules:
            if name == "transformer" or not self._offloaded:
                self.components[name].to(device)
        return self

    def with_transformer(
        self, transformer: nn.Module, generation_config: GenerationConfig, *, student: bool = False
    ) -> TextToImagePipeline:
        """A pipeline with another transformer and generation config, that of a student of this model for one; the other
        components are shared."""
        replaced = {**(self.family.student_components(self.components) if student else {}), "transformer": transformer}
        return TextToImagePipeline(self.family, {**self.components, **replaced}, generation_config)

    def set_size(self, side: int | None, frames: int | None = None) -> None:
        """Make square images of ``side`` pixels, or videos of ``frames``, the default, as a recipe's ``resolution`` and
        ``frames`` do; None changes nothing. Raises: UserError if there are none of this size."""
        if side is not None and side % self.latent_multiple:
            raise UserError(f"resolution {side}: not a multiple of {self.latent_multiple}")
        latent_frames(self.family, self.components, frames or 1)
        sizes = {"height": side, "width": side, "frames": frames}
        given = {name: size for name, size in sizes.items() if size is not None}
        self.generation_config = self.generation_config.model_copy(update=given)

    def enable_model_cpu_offload(self) -> None:
        """Keep all modules but the transformer in the CPU's memory, and move each to the transformer's device while it
        is used."""
        for name in self.family.modules:
            if name != "transformer":
                self.components[name].to("cpu")
        self._offloaded = True
        self.encoder.on_device = lambda: self._on_device(self.encoder.text_encoder)

    @contextmanager
    def _on_device(self, module: nn.Module) -> Iterator[None]:
        """Inside, an offloaded module is on the transformer's device."""
        if self._offloaded:
            module.to(self.device)
        try:
            yield
        finally:
            if self._offloaded:
                module.to("cpu")

    def set_attention_backend(self, backend: str) -> None:
        """Compute attention with one of diffusers' backends, for all models of this process.

        Raises:
            UserError: there is no such backend, it does not run here, or the family's attention has none.
        """
        if not self.family.attention_backends:
            raise UserError(f"attention {backend}: {self.family.pipeline_class} has PyTorch's alone; leave it out")
        dtype = torch.bfloat16 if is_fp8(self.transformer) else self.transformer.dtype
        use_attention_backend(self.transformer, backend, self.device, dtype)

    def sigmas(self, steps: int, size: tuple[int, int] | None = None) -> list[float]:
        """The noise levels of ``steps`` steps, from 1 to the terminal 0: ``steps + 1`` numbers; those of the generation
        config where it has as many. ``size`` is height and width in pixels, the family's by default."""
        config = self.generation_config
        if config.sigmas is not None and len(config.sigmas) == steps + 1:
            return config.sigmas
        return self.family.sigmas(self.components, steps, None if size is None else self.latent_shape(*size))

    def encode(self, texts: Sequence[str], *, system: str | None = None, assistant_prefix: str = "") -> EncodedPrompts:
        """One batch of encoded prompts, in fp32; "" is the null prompt. Recent prompts are cached.

        Args:
            system: the system prompt; None is the generation config's, "" is none.
            assistant_prefix: text placed inside ``<think>...</think>`` after the prompt.

        Raises:
            UserError: a prompt is too long, or not valid Unicode.
        """
        return self.encoder(texts, system=system, assistant_prefix=assistant_prefix)

    @property
    def latent_multiple(self) -> int:
        """Pixels that the sides of an image must be a multiple of (16 for Z-Image)."""
        return self.family.latent_multiple(self.components)

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """Shape of the latent of one image or video, without the batch: channels, ..., rows, columns. Raises: UserError
        if a side is not a multiple of ``latent_multiple``, or as for ``frames.latent_frames``."""
        for name, side in (("height", height), ("width", width)):
            if side < 1 or side % self.latent_multiple:
                raise UserError(f"{name} {side} is not a multiple of {self.latent_multiple}")
        channels, *sides = self.family.latent_shape(self.components, height, width)
        return channels, *latent_frames(self.family, self.components, frames), *sides

    def encode_images(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], or videos [B, 3, F, H, W] -> latents."""
        with self._on_device(self.vae):
            return self.family.encode_images(self.vae, images)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images [B, 3, H, W] in [0, 1], or videos [B, 3, F, H, W]."""
        with self._on_device(self.vae):
            return self.family.decode_latents(self.vae, latents)

    def save(self, folder: str | Path, write: Callable[[Path], object] | None = None) -> Path:
        """Write a folder that diffusers' pipeline of this family opens. It appears complete or not at all.

        Args:
            write: writes the transformer into its folder; unset, it is written with its weights as they are.

        Raises:
            UserError: the weights are in fp8, which such a folder cannot hold; or it cannot be written, or holds other
                files than a model.
        """
        if write is None and is_fp8(self.transformer):
            raise UserError(f"{folder}: weights in fp8 cannot be saved as a folder; load the model in bf16")
        folder = Path(folder)
        check_replaceable(folder)
        with atomic_folder(folder) as draft, silence_loggers():
            self.family.write_index(self.components, draft, self.generation_config)
            for name in self.family.component_names:
                if name == "transformer" and write is not None:
                    write(draft / name)
                else:
                    self.family.save_component(name, self.components[name], draft / name)
            (draft / GENERATION_CONFIG).write_text(self.generation_config.dump(folder), encoding="utf-8")
        return folder


def load(
    path_or_name: str | Path,
    device: str | torch.device = AUTO,
    dtype: torch.dtype | None = None,
    offload: Literal["none", "model", "group"] = "none",
    loras: Mapping[str, float] | None = None,
    ignore: Sequence[str] = (),
    vae: str | Path | None = None,
    aot: str | Path | None = None,
) -> TextToImagePipeline:
    """Load a model for inference: all its weights frozen, in eval mode.

    Args:
        path_or_name: a folder in diffusers' layout, a Hugging Face hub id, or "micro", the bundled teacher.
        device: "auto" is the GPU where there is one, else the CPU; the first such load names it on standard error.
        dtype: of the weights: fp32, bf16, or ``torch.float8_e4m3fn`` for the matrices of the transformer's blocks (the
            rest is bf16 then, and matrix products are fp8 where the device has fast ones). Unset, each component's
            stored one: bf16, else fp32.
        offload: "model": only the transformer stays on the device (``enable_model_cpu_offload``); "group": of the
            transformer only the block that computes (``offload_blocks``).
        loras: LoRA files with their strengths, merged into the weights (``models.lora``) before they are quantized.
        ignore: keys in these files to leave out; any other key that binds no layer is an error.
        vae: folder of an autoencoder in place of the model's own (``other_vae.load_other_vae``).
        aot: package of ``fewstep export --aot``, whose machine code runs: it must be trusted.

    Raises:
        UserError: no such device or model, a file that is missing or corrupt, or a dtype that overflows (fp16).
    """
    if aot is not None:
        check_package(aot, offload)
    chosen, folder = resolve_device(device), resolve_model(path_or_name)
    if aot is not None:
        check_one_transformer(folder, "aot")
    family = resolve_family(folder)
    fp8, adapters = dtype == FP8, open_loras(folder, loras or {}, ignore)
    read_dtype = torch.bfloat16 if fp8 else dtype
    other_vae = {} if vae is None else {"vae": load_other_vae(vae, folder, family, read_dtype)}
    own = [name for name in family.component_names if name not in other_vae]
    components = load_components(folder, family, own, read_dtype) | other_vae
    check_components(folder, family, components)
    merge_(components["transformer"], adapters)
    config = load_generation_config(folder)
    stack = add_step_loras(components["transformer"], folder, config.steps) if config.step_loras else []
    if fp8:
        quantize_fp8_(components["transformer"], family.quantizable_modules, supports_fp8_matmul(chosen))
        warn_without_fp8_matmul(chosen)
    warn_if_weights_are_emulated(components["transformer"], chosen)
    model = TextToImagePipeline(family, components, config)
    model.folder = folder
    if device == AUTO:
        log_device(chosen)
    if offload == "none":
        model.to(chosen)
    else:
        offload_blocks(model.denoiser, chosen) if offload == "group" else model.transformer.to(chosen)
        model.enable_model_cpu_offload()
    if aot is not None:
        model.denoiser.ahead_of_time = load_package(aot, model.denoiser)
    if stack:
        model.denoiser = StepAdapterDenoiser(model.denoiser, stack, config.sigmas or [])  # type: ignore[assignment]
    return model


def load_components(
    folder: Path, family: ModelFamily, names: Sequence[str], dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Components of the model in a folder, by name. Errors as for :func:`load`."""
    found = {name: load_component(folder, name, dtype, family) for name in names}
    return found | {"vae": to_channels_last(found["vae"])} if "vae" in found else found
