"""The configuration of an adapter beside its weights: peft's ``adapter_config.json``, and diffusers' in the header."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.errors import UserError

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # key of the header
_COMPONENT = "transformer."


@dataclass(frozen=True)
class AdapterConfig:
    """Ranks and alphas that a file's tensors do not have.

    Attributes:
        rank, alpha: of modules that no pattern matches.
        rank_pattern, alpha_pattern: those of others, by a regular expression for the end of the name, as in peft.
        rslora: whether the scale is alpha / sqrt(rank) (arXiv 2312.03732).
        base: the model that it was trained on, "" if not known.
    """

    rank: float
    alpha: float
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    base: str = ""

    def scale(self, module: str) -> float:
        """What ``up @ down`` of a module is multiplied by."""
        rank, alpha = _pick(self.rank_pattern, module, self.rank), _pick(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_peft_config(file: Path) -> AdapterConfig:
    """Raises: UserError if it cannot be read, or lacks the rank."""
    try:
        return _parse(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise UserError(
            f"{file}: no configuration of an adapter can be read ({type(error).__name__}: {error})"
        ) from None


def header_config(file: Path, metadata: Mapping[str, str]) -> AdapterConfig | None:
    """The configuration that diffusers writes into the header, if there is one. Raises: UserError if it is damaged."""
    text = metadata.get(DIFFUSERS_CONFIG)
    if text is None:
        return None
    try:
        tree = json.loads(text)
        own = {key.removeprefix(_COMPONENT): value for key, value in tree.items() if key.startswith(_COMPONENT)}
        return _parse(own) if own else None
    except (ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise UserError(f"{file}: {DIFFUSERS_CONFIG} in its header cannot be read ({error})") from None


def _parse(tree: Mapping[str, Any]) -> AdapterConfig:
    rank = _positive(tree["r"])
    alphas = dict(tree.get("alpha_pattern") or {})
    ranks = dict(tree.get("rank_pattern") or {})
    for pattern in (*alphas, *ranks):
        re.compile(pattern)
    return AdapterConfig(
        rank,
        float(tree.get("lora_alpha", tree.get("alpha", rank))),
        {key: _positive(value) for key, value in ranks.items()},
        {key: float(value) for key, value in alphas.items()},
        bool(tree.get("use_rslora", False)),
        str(tree.get("base_model_name_or_path") or ""),
    )


def _positive(value: Any) -> float:
    if not float(value) > 0:
        raise ValueError(f"rank {value}")
    return float(value)


def _pick(patterns: Mapping[str, float], module: str, default: float) -> float:
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)
