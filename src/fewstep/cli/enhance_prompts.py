"""`fewstep generate --enhance`: the prompts, revised by a language model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from fewstep.core.device import resolve_device
from fewstep.inference.enhancer import OWN, Enhancer, enhancer_for, open_answers
from fewstep.models.components import load_component
from fewstep.models.language_model import check_language_head, text_encoder_with_head
from fewstep.progress import log_line, track


def enhance_prompts(prompts: Sequence[str], where: str, folder: Path, device: str, system: str | None) -> list[str]:
    """The revised prompts, shown one by one; with a warning, the original one where it is kept.

    Args:
        where: the language model: "own" is the image model's text encoder; else a folder, or an endpoint "URL#MODEL".
        folder: of the image model.
        system: the system prompt of the images; None is the model's.

    Raises:
        UserError: the language model cannot be loaded.
    """
    enhancer = _open(where, folder, device, system)
    found = []
    for prompt in track(prompts, "revising prompts"):
        revision = enhancer(prompt)
        if revision.problem is None:
            log_line(f"revised prompt: {revision.prompt}")
        else:
            warnings.warn(f"the prompt is used as it is: {revision.problem}", stacklevel=2)
        found.append(revision.prompt)
    return found


def _open(where: str, folder: Path, device: str, system: str | None) -> Enhancer:
    chosen = resolve_device(device)
    if where == OWN:
        check_language_head(folder)
        tokenizer, encoder = load_component(folder, "tokenizer"), load_component(folder, "text_encoder").to(chosen)
        return enhancer_for(folder, text_encoder_with_head(folder, encoder, tokenizer), system)
    return enhancer_for(folder, open_answers(where, chosen), system)
