"""Checkpoints of rewards with random weights, in the layouts of the published ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_checkpoints import save_clip
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "red", "photo", "of"]


class OpenClipTower(nn.Module):
    """A transformer with open_clip's names: nn.MultiheadAttention and an MLP in residual blocks."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.resblocks = nn.ModuleList()
        for _ in range(layers):
            block = nn.Module()
            block.ln_1, block.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            block.attn = nn.MultiheadAttention(width, heads, batch_first=True)
            block.mlp = nn.Sequential()
            block.mlp.c_fc, block.mlp.gelu, block.mlp.c_proj = (
                *(nn.Linear(width, 2 * width), nn.GELU()),
                nn.Linear(2 * width, width),
            )
            self.resblocks.append(block)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            y = block.ln_1(x)
            x = x + block.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            x = x + block.mlp(block.ln_2(x))
        return x


class OpenClip(nn.Module):
    """open_clip's CLIP (VisionTransformer and text transformer), of 28 px images and two layers."""

    def __init__(self, vocabulary: int, tokens: int = 24, width: int = 128, embed: int = 16) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, width, 14, stride=14, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(width))
        self.visual.positional_embedding = nn.Parameter(torch.randn(5, width))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.visual.transformer = OpenClipTower(width, 2, 2)
        self.visual.proj = nn.Parameter(torch.randn(width, embed))
        self.token_embedding = nn.Embedding(vocabulary, 64)
        self.positional_embedding = nn.Parameter(torch.randn(tokens, 64))
        self.transformer = OpenClipTower(64, 1, 2)
        self.ln_final = nn.LayerNorm(64)
        self.text_projection = nn.Parameter(torch.randn(64, embed))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def encode_image(self, pixels: Tensor) -> Tensor:
        visual = self.visual
        patches = visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
        x = visual.transformer(visual.ln_pre(x + visual.positional_embedding))
        return visual.ln_post(x[:, 0]) @ visual.proj

    def encode_text(self, ids: Tensor, end: int) -> Tensor:
        length = ids.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding[:length], mask)
        last = (ids == end).int().argmax(1)
        return self.ln_final(x)[torch.arange(len(ids)), last] @ self.text_projection


def save_open_clip(folder: Path, with_config: bool = True) -> OpenClip:
    """open_clip's layout with random weights, and CLIP's tokenizer of single letters."""
    save_clip(folder)
    for name in ("model.safetensors", "config.json", "preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink(missing_ok=True)
    torch.manual_seed(1)
    model = OpenClip(54).eval().requires_grad_(False)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "hps.safetensors")
    if with_config:
        settings = {"model_cfg": {}, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}}
        (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return model


def save_head(file: Path, width: int) -> dict[str, Tensor]:
    """A head with the names of LAION's predictor: linear layers 0, 2, 4, with dropout between them."""
    generator = torch.Generator().manual_seed(2)
    sizes = {0: (width, 12), 2: (12, 6), 4: (6, 1)}
    weights = {}
    for number, (inputs, outputs) in sizes.items():
        weights[f"layers.{number}.weight"] = torch.randn(outputs, inputs, generator=generator)
        weights[f"layers.{number}.bias"] = torch.randn(outputs, generator=generator)
    save_file(weights, file)
    return weights


class OriginalViT(nn.Module):
    """BLIP's own image encoder (timm's VisionTransformer), of 32 px images and two layers, width 64."""

    def __init__(self, width: int = 64, size: int = 32, patch: int = 16) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList()
        for _ in range(2):
            block = nn.Module()
            block.norm1, block.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
            block.attn = nn.Module()
            block.attn.qkv, block.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            block.mlp = nn.Module()
            block.mlp.fc1, block.mlp.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
            self.blocks.append(block)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)  # one head of width 64
            x = x + block.attn.proj((q @ k.transpose(1, 2) / 8).softmax(-1) @ v)
            x = x + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(x))))
        return self.norm(x)


def save_image_reward(folder: Path) -> tuple[OriginalViT, BlipTextModel, dict[str, Tensor]]:
    """ImageReward's tensors under their original names, with a tokenizer of a few words."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(3)
    vision = OriginalViT().eval().requires_grad_(False)
    text_config = BlipTextConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=40,
        encoder_hidden_size=64,
    )
    text = BlipTextModel(text_config, add_pooling_layer=False).eval().requires_grad_(False)
    head = save_head(folder / "head.safetensors", 64)
    (folder / "head.safetensors").unlink()
    tensors = {f"blip.visual_encoder.{name}": tensor for name, tensor in vision.state_dict().items()}
    tensors |= {f"blip.text_encoder.{name}": tensor for name, tensor in text.state_dict().items()}
    tensors |= {f"mlp.{name}": tensor for name, tensor in head.items()}
    tensors["blip.text_proj.weight"] = torch.zeros(2, 2)  # of BLIP's pretraining, not used
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "ImageReward.safetensors")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(folder)
    return vision, text, head
