"""Whether the components of a model fit each other: found when it is loaded, not in use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.errors import UserError
from fewstep.models.text import apply_chat_template

if TYPE_CHECKING:
    from fewstep.models.family import Components, ModelFamily

#: A component's name, and what is wrong with it.
Mismatch = tuple[str, str]

_PROBE = "a fox in the snow"


def check_components(folder: Path, family: ModelFamily, components: Components) -> None:
    """Refuse a model whose components do not belong together.

    Args:
        components: all of them, or those of the prompt encoder alone.

    Raises:
        UserError: names the component and both values.
    """
    for name, problem in family.mismatches(components):
        raise UserError(f"{folder / name}: {problem}")


def text_mismatches(components: Components, width: int | None) -> Iterator[Mismatch]:
    """What is wrong with a language model as the text encoder, and with its tokenizer.

    Args:
        width: of the prompts' features that the transformer takes; None if it is not loaded.
    """
    config, tokenizer = components["text_encoder"].config, components["tokenizer"]
    if width is not None and config.hidden_size != width:
        yield "text_encoder", f"its hidden states have {config.hidden_size} features, the transformer takes {width}"
    yield from vocabulary_mismatches("tokenizer", tokenizer, config.vocab_size)


def vocabulary_mismatches(name: str, tokenizer: Any, embeddings: int) -> Iterator[Mismatch]:
    """What is wrong with a tokenizer for a text encoder with so many embeddings; None is that of a model of shapes
    alone."""
    if tokenizer is not None and len(tokenizer) > embeddings:
        yield name, f"has {len(tokenizer)} tokens, the text encoder has embeddings for {embeddings}"


def chat_template_mismatches(tokenizer: Any) -> Iterator[Mismatch]:
    """What is wrong with a tokenizer whose chat template makes the prompts; None is that of a model of shapes alone."""
    if tokenizer is None:
        return
    if tokenizer.chat_template is None:
        yield "tokenizer", "has no chat template; add the chat_template.jinja that the text encoder was trained with"
    elif _PROBE not in apply_chat_template(tokenizer, _PROBE):
        yield "tokenizer", "its chat template leaves the prompt out"


def vae_mismatches(vae: Any, channels: int) -> Iterator[Mismatch]:
    """What is wrong with an ``AutoencoderKL`` for latents of so many channels."""
    config = vae.config
    if config.latent_channels != channels:
        yield "vae", f"its latents have {config.latent_channels} channels, the transformer takes {channels}"
    for side in ("in_channels", "out_channels"):
        if config[side] != 3:
            yield "vae", f"{side} is {config[side]}; images have 3"
    for name in ("scaling_factor", "shift_factor"):
        value = config[name]
        if not _is_finite(value) or (name == "scaling_factor" and value <= 0):
            needed = "a positive number" if name == "scaling_factor" else "a finite number"
            yield "vae", f"{name} in its config.json is {value}; the transformer's latents need {needed}"


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
