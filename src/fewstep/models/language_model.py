"""A causal language model that writes text on this machine: any local one, or a model's text encoder with its head."""

from __future__ import annotations

import copy
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fewstep.errors import UserError
from fewstep.models.components import read_config
from fewstep.models.fingerprint import path_fingerprint
from fewstep.models.library_logs import silence_loggers
from fewstep.models.text import apply_chat_template
from fewstep.models.weight_files import file_of_tensor, tensor_names

_HEAD = "lm_head.weight"


class LanguageModel:
    """Attributes:
    identity: recognizes the model wherever it is.
    """

    def __init__(self, tokenizer: Any, model: Any, identity: str) -> None:
        self.tokenizer, self.model, self.identity, self._lock = tokenizer, model, identity, Lock()

    @torch.no_grad()
    def answer(self, system: str, text: str, max_tokens: int, seconds: float) -> str:
        """Greedy, and so the same each time, unless ``seconds`` cut it off."""
        with self._lock:
            chat = apply_chat_template(self.tokenizer, text, system)
            tokens = self.tokenizer(chat, return_tensors="pt").to(self.model.device)
            made = self.model.generate(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                max_new_tokens=max_tokens,
                max_time=seconds,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )
            return str(self.tokenizer.decode(made[0, tokens.input_ids.shape[1] :], skip_special_tokens=True))


def open_language_model(folder: Path, device: torch.device) -> LanguageModel:
    """A causal language model in transformers' layout, of weights in safetensors. Raises: UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give that of a causal language model")
    try:
        with silence_loggers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", use_safetensors=True, local_files_only=True
            )
    except Exception as error:  # libraries raise many types for a bad folder
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: no causal language model can be loaded ({reason})") from None
    return _checked(folder, LanguageModel(tokenizer, model.to(device).eval(), path_fingerprint(folder) or ""))


def text_encoder_with_head(folder: Path, text_encoder: nn.Module, tokenizer: Any) -> LanguageModel:
    """A model's text encoder as the language model that it is. The weights are shared with it; the tokenizer is copied,
    since it is not to be used in two threads at once.

    Args:
        folder: of the whole model.

    Raises:
        UserError: its weights have no language head.
    """
    check_language_head(folder)
    config = text_encoder.config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    setattr(model, model.base_model_prefix, text_encoder)
    head = model.get_output_embeddings()
    head.weight = text_encoder.get_input_embeddings().weight  # type: ignore[operator]
    if not config.tie_word_embeddings:  # type: ignore[union-attr]
        head.weight = nn.Parameter(_read_head(folder / "text_encoder").to(head.weight), requires_grad=False)
    settings = folder / "text_encoder" / "generation_config.json"
    if settings.is_file():
        model.generation_config = GenerationConfig.from_pretrained(settings.parent)
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    identity = path_fingerprint(folder / "text_encoder") or ""
    return LanguageModel(copy.deepcopy(tokenizer), model.eval(), identity)


def check_language_head(folder: Path) -> None:
    """Raises: UserError where a model's text encoder has no language head, from its configuration and file names."""
    config = read_config(folder, "text_encoder")
    causal = any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ())
    if causal and (config.get("tie_word_embeddings") or _HEAD in tensor_names(folder / "text_encoder")):
        return
    raise UserError(
        f"{folder / 'text_encoder'}: has no language head to revise prompts with; give --enhancer FOLDER of a causal "
        "language model, or URL#MODEL"
    )


def _read_head(folder: Path) -> torch.Tensor:
    file = file_of_tensor(folder, _HEAD)
    try:
        with safe_open(file, "pt") as tensors:
            head: torch.Tensor = tensors.get_tensor(_HEAD)
            return head
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: {_HEAD} cannot be read ({error})") from None


def _checked(folder: Path, model: LanguageModel) -> LanguageModel:
    if model.tokenizer.chat_template is None:
        raise UserError(f"{folder}: its tokenizer has no chat template; give a model that was trained on instructions")
    return model
