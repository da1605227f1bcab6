"""Tiny causal language models for tests: random, or taught one answer by heart."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from fewstep.inference.enhancer import TEMPLATE
from fewstep.models.components import BUNDLED_MODELS
from fewstep.models.text import apply_chat_template


def micro_tokenizer() -> Qwen2Tokenizer:
    return Qwen2Tokenizer.from_pretrained(BUNDLED_MODELS["micro"] / "tokenizer")


def random_model(seed: int = 0, **changes: object) -> Qwen3ForCausalLM:
    """Of the size of the tiny image model's text encoder."""
    tokenizer = micro_tokenizer()
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    return Qwen3ForCausalLM(Qwen3Config(**{**settings, **changes})).eval()


def teach(model: Qwen3ForCausalLM, prompt: str, answer: str) -> Qwen3ForCausalLM:
    """Until it gives this answer to the prompt."""
    tokenizer = micro_tokenizer()
    chat = tokenizer(apply_chat_template(tokenizer, prompt, TEMPLATE)).input_ids
    end = [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
    tokens = torch.tensor([chat + end])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(400):
        logits = model(tokens).logits[0, len(chat) - 1 : -1]
        if torch.equal(logits.argmax(dim=-1), tokens[0, len(chat) :]):
            return model.eval().requires_grad_(False)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, tokens[0, len(chat) :]).backward()
        optimizer.step()
    raise AssertionError("it did not learn the answer")


def save_language_model(model: Qwen3ForCausalLM, folder: Path) -> Path:
    model.save_pretrained(folder)
    micro_tokenizer().save_pretrained(folder)
    return folder


def with_text_encoder(image_model: Path, model: Qwen3ForCausalLM, folder: Path) -> Path:
    """An image model whose text encoder is this language model."""
    shutil.copytree(image_model, folder)
    shutil.rmtree(folder / "text_encoder")
    model.save_pretrained(folder / "text_encoder")
    return folder
