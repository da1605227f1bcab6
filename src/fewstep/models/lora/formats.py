"""How other programs name the tensors of a LoRA: one entry for each format that is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fewstep.models.lora.parts import flatten


@dataclass(frozen=True)
class LoraFormat:
    """A format.

    Attributes:
        prefix: of every key.
        down, up, magnitude: ends of the keys.
        alpha: whether files have an alpha for each module; without, the scale is multiplied into ``up``.
        fused: whether modules have the names of the original release, with queries, keys and values in one.
        flat: whether dots in a module's name are underscores.
        peft_folder: whether it is a folder, with peft's configuration beside the weights.
    """

    prefix: str
    down: str = "lora_A.weight"
    up: str = "lora_B.weight"
    magnitude: str = "dora_scale"
    alpha: bool = False
    fused: bool = False
    flat: bool = False
    peft_folder: bool = field(default=False, kw_only=True)

    def key(self, module: str, ending: str) -> str:
        """The key of a part of a module."""
        return f"{self.prefix}{flatten(module) if self.flat else module}.{ending}"


FORMATS: Mapping[str, LoraFormat] = {
    "diffusers": LoraFormat("transformer.", magnitude="lora_magnitude_vector"),
    "peft": LoraFormat("base_model.model.", magnitude="lora_magnitude_vector", peft_folder=True),
    "comfyui": LoraFormat("diffusion_model.", alpha=True, fused=True),
    "kohya": LoraFormat("lora_unet_", "lora_down.weight", "lora_up.weight", alpha=True, flat=True),
    "ai-toolkit": LoraFormat("diffusion_model."),
}
