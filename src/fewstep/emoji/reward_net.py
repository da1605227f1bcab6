"""The two towers of the emoji reward: a small convolutional network on images, hashed words and pairs on prompts."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 64  # pixels per side; other sizes are resized to it
BUCKETS = 8192  # of hashed words and pairs
_UNITS = re.compile(r"[a-z0-9]+|[^\W\d_a-z]")  # a word of Latin letters, or one Chinese character


class EmojiRewardNet(nn.Module):
    """The cosine of an image and a prompt in a shared space.

    Another architecture than the classifier's: overlapping patches, SiLU, which is smooth, and mean and largest value
    at the end. Kernels are multiples of the strides, so that the gradient has no checkerboard.
    """

    def __init__(self, channels: int = 32, text_width: int = 96, width: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 8, stride=4, padding=2)]
        for _ in range(2):
            layers += [nn.SiLU(), nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1)]
            channels *= 2
            layers += [_Block(channels), _Block(channels)]
        self.image_body = nn.Sequential(*layers)
        self.image_head = nn.Sequential(nn.LayerNorm(2 * channels), nn.Linear(2 * channels, width))
        self.phrases = nn.EmbeddingBag(BUCKETS, text_width, mode="sum")
        self.text_norm = nn.LayerNorm(text_width)
        self.text_body = nn.Sequential(
            nn.Linear(text_width, 2 * text_width), nn.GELU(), nn.Linear(2 * text_width, text_width)
        )
        self.text_head = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
        self.log_scale = nn.Parameter(torch.tensor(14.0).log())  # of the contrastive loss

    def image(self, images: Tensor) -> Tensor:
        """Images [N, 3, 64, 64] in [0, 1] -> unit vectors [N, width]."""
        hidden = self.image_body((images * 2 - 1).contiguous(memory_format=torch.channels_last))
        pooled = torch.cat([hidden.mean((2, 3)), hidden.amax((2, 3))], dim=1).float()
        return F.normalize(self.image_head(pooled), dim=-1)

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> unit vectors [N, width]."""
        hashed = [phrase_hashes(prompt) for prompt in prompts]
        device = self.phrases.weight.device
        ids = torch.tensor([bucket for one in hashed for bucket in one], dtype=torch.long, device=device)
        counts = torch.tensor([0, *(len(one) for one in hashed[:-1])], device=device)
        with torch.autocast(device.type, enabled=False):
            hidden = self.text_norm(self.phrases(ids, counts.cumsum(0)))
            return F.normalize(self.text_head(hidden + self.text_body(hidden)), dim=-1)


def phrase_hashes(prompt: str) -> list[int]:
    """The buckets of a prompt's words and pairs of neighbors; of Chinese, characters, pairs and triples.

    A prompt's embedding is nearly the sum of those of its phrases, and so are combinations that were never seen.
    """
    units = _UNITS.findall(prompt.lower())
    latin = all(unit.isascii() for unit in units)
    phrases = [" ".join(units[i : i + n]) for n in ((1, 2) if latin else (1, 2, 3)) for i in range(len(units) - n + 1)]
    return [zlib.crc32(phrase.encode()) % BUCKETS for phrase in phrases]


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(4, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.norm(self.first(x))))
