"""LoRA files on a model: read before its weights are, merged into them before they are quantized."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from fewstep.errors import UserError
from fewstep.models.generation_config import GenerationConfig, load_generation_config
from fewstep.models.lora.bind import changes_nothing, read_lora
from fewstep.models.lora.metadata import trained_on
from fewstep.models.lora.read import check_ignored, matching_patterns
from fewstep.models.lora.targets import LoraTargets, model_targets
from fewstep.models.lora.weights import Lora
from fewstep.models.quantize import Fp8Linear
from fewstep.progress import log_line

#: Adapters with their strengths.
Weighted = Sequence[tuple[Lora, float]]


def parse_lora(text: str) -> tuple[str, float]:
    """``FILE`` or ``FILE:strength`` -> file and strength, 1 by default. Raises: UserError."""
    file, colon, number = text.rpartition(":")
    if not colon or Path(text).expanduser().exists() or "/" in number or "\\" in number:
        return text, 1.0
    try:
        strength = float(number)
    except ValueError:
        raise UserError(f"{text}: the strength {number!r} is no number; write FILE:0.8") from None
    return file, strength


def parse_loras(texts: Sequence[str]) -> dict[str, float]:
    """Several of them, by file. Raises: UserError, also for a file that is named twice."""
    parsed = [parse_lora(text) for text in texts]
    names = [file for file, _ in parsed]
    twice = next((file for file in names if names.count(file) > 1), None)
    if twice is not None:
        raise UserError(f"{twice}: given twice; give it once, with the sum of the strengths")
    return dict(parsed)


def read_loras(
    loras: Mapping[str, float], targets: LoraTargets, ignore: Sequence[str] = ()
) -> list[tuple[Lora, float]]:
    """Read adapters {file or folder: strength}.

    Args:
        ignore: keys, or patterns of keys, that are left out; each must match in one of the files.

    Raises:
        UserError: see :func:`read_lora`; or a strength is no finite number, or a pattern matches nothing.
    """
    for file, strength in loras.items():
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
            raise UserError(f"{file}: the strength {strength!r} is no finite number")
    check_ignored(list(loras), ignore)
    found = [
        (read_lora(file, targets, matching_patterns(file, ignore)), float(strength)) for file, strength in loras.items()
    ]
    for lora, _ in found:
        if changes_nothing(lora):
            warnings.warn(f"{lora.file}: all of its updates are zero: it changes nothing", stacklevel=3)
    return found


def open_loras(folder: Path, loras: Mapping[str, float], ignore: Sequence[str] = ()) -> list[tuple[Lora, float]]:
    """Read adapters {file or folder: strength} for the model in ``folder``, before its weights are; prints a line about
    what was bound, and one about an adapter of a multi-step model on a few-step one.

    Raises:
        UserError: see :func:`read_loras`.
    """
    if not loras:
        return read_loras(loras, LoraTargets({}, None), ignore)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading the model gives them again
        config = load_generation_config(folder)
    targets = model_targets(folder)
    found = read_loras(loras, targets, ignore)
    for lora, strength in found:
        log_line(describe(lora, targets, strength))
        if trained_on(lora.metadata) == "base" and is_few_step(config):
            log_line(
                f"lora: {lora.file}: trained on a multi-step model, and this is a few-step one: try several strengths; "
                "fewstep's study has 0.8 to 1"
            )
    return found


def is_few_step(config: GenerationConfig) -> bool:
    """Whether a model is sampled in a few steps, without guidance."""
    return config.guidance_distilled or (config.steps <= 8 and config.guidance_scale == 0)


def describe(lora: Lora, targets: LoraTargets, strength: float) -> str:
    """A line about what was bound."""
    ranks = lora.ranks
    rank = "" if not ranks else f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {ranks[0]} to {ranks[-1]}"
    modules = f"{lora.modules} module{'s' * (lora.modules != 1)}"
    layers = f"{len(lora.updates)} of {len(targets.shapes)} linear layers"
    return f"lora: {lora.file}: {modules} bound to {layers}{rank}, strength {strength:g}"


@torch.no_grad()
def merge_(transformer: nn.Module, loras: Weighted) -> None:
    """Add ``strength * delta`` of every adapter to the weights, in place.

    The sum is taken in fp32, in the order of the files' names, and rounded once: the order in which the adapters are
    given does not matter. DoRA's delta refers to the weights before any adapter.

    Raises:
        ValueError: the weights are in fp8; they are quantized after merging.
    """
    ordered = sorted(loras, key=lambda weighted: str(weighted[0].file))
    for name in dict.fromkeys(name for lora, _ in ordered for name in lora.updates):
        layer = transformer.get_submodule(name)
        if isinstance(layer, Fp8Linear):
            raise ValueError(f"{name} is in fp8: merge adapters before quantizing")
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        deltas = [s * lora.updates[name].delta(weight) for lora, s in ordered if s and name in lora.updates]
        if deltas:
            weight.copy_(weight.float() + sum(deltas[1:], start=deltas[0]))
