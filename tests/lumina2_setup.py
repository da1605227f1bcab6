"""A Lumina 2 of random weights: all components of ``Lumina2Pipeline``, 64 px."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from tokenizers import AddedToken
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from fewstep.models.lumina2.prompts import SYSTEM_PROMPT


def byte_tokenizer() -> GemmaTokenizer:
    """Splits text into bytes, after <bos>; the system prompt is one token, so that prompts fit into 256."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    words = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = GemmaTokenizer(vocab={word: index for index, word in enumerate(words)})
    tokenizer.add_bos_token = True
    tokenizer.add_tokens([AddedToken(SYSTEM_PROMPT, normalized=False)])
    return tokenizer


def save_lumina2(folder: Path) -> Path:
    """Written by diffusers."""
    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        in_channels=4, hidden_size=48, num_layers=3, num_refiner_layers=1, num_attention_heads=4, num_kv_heads=2,
        multiple_of=16, axes_dim_rope=(4, 4, 4), axes_lens=(300, 32, 32), cap_feat_dim=16,
    )  # fmt: skip
    for parameter in transformer.parameters():  # the modulation is initialized to 0, which would hide differences
        torch.nn.init.normal_(parameter, std=0.1)
    config = Gemma2Config(
        vocab_size=262, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=64,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=4, latent_channels=4, shift_factor=0.1,
        scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    Lumina2Pipeline(transformer, scheduler, vae, Gemma2Model(config), byte_tokenizer()).save_pretrained(folder)
    return folder
