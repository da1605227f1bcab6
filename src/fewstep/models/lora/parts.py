"""The keys of LoRA files: a module's name and the part that a tensor is of its adapter."""

from __future__ import annotations

import re

#: A part of an adapter -> how files end the keys of its tensors. "*" is an adapter's name, such as peft's "default".
SPELLINGS = {
    "down": ("lora_A.weight", "lora_A.*.weight", "lora_down.weight", "lora.down.weight", "lora_A"),
    "up": ("lora_B.weight", "lora_B.*.weight", "lora_up.weight", "lora.up.weight", "lora_B"),
    "alpha": ("alpha",),
    "magnitude": (
        *("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"),
        *("lora_magnitude_vector.*.weight", "lora_magnitude_vector.*"),
    ),
    **{part: (part, f"{part}.*") for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")},
    **{part: (part, f"{part}.*") for part in ("lokr_w2", "lokr_w2_a", "lokr_w2_b")},
}

#: Ends of keys of adapters that are not supported -> what they are.
UNSUPPORTED = {
    "lora_mid.weight": "a convolution's (lora_mid)",
    "lokr_t2": "a convolution's (LoKr with Tucker decomposition)",
    **dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"), "LoHa"),
    **dict.fromkeys(("oft_blocks", "oft_diag", "oft_r"), "OFT"),
    **dict.fromkeys(("diff", "diff_b", "set_weight"), "a full difference, not a low-rank one"),
    **dict.fromkeys(("lora_B.bias", "lora_up.bias"), "a bias"),
    **dict.fromkeys(("a1.weight", "a2.weight", "b1.weight", "b2.weight"), "GLoRA"),
    **dict.fromkeys(("on_input", "lora_E"), "of a kind of adapter that is not supported"),
}

#: What may precede a module's name, repeated and in any order.
PREFIXES = (
    *("base_model.model.", "transformer.", "model.diffusion_model.", "diffusion_model.", "model.", "unet."),
    *("lora_unet_", "lora_transformer_", "lycoris_"),
)

#: Starts of the keys of text encoders.
TEXT_ENCODERS = ("text_encoder", "text_encoders.", "lora_te", "te.", "te1.", "te2.", "cond_stage_model.", "text_model.")


def _pattern(endings: tuple[str, ...]) -> re.Pattern[str]:
    either = "|".join(re.escape(ending).replace(r"\*", r"[^.]+") for ending in endings)
    return re.compile(rf"(?P<module>.+?)\.(?:{either})")


_PARTS = {part: _pattern(endings) for part, endings in SPELLINGS.items()}


def split_key(key: str) -> tuple[str, str] | None:
    """A key -> (module, part), the part a key of ``SPELLINGS``; None if it is no such key."""
    for part, pattern in _PARTS.items():
        match = pattern.fullmatch(key)
        if match is not None:
            return match["module"], part
    return None


def unsupported_kind(key: str) -> str | None:
    """What a key is of that is not supported; None if that is not known."""
    if key.startswith(TEXT_ENCODERS):
        return "a text encoder's; only the transformer is adapted"
    return next((kind for ending, kind in UNSUPPORTED.items() if key.endswith(f".{ending}")), None)


def flatten(name: str) -> str:
    """A name with underscores alone, as kohya's trainers write it."""
    return name.replace(".", "_")
