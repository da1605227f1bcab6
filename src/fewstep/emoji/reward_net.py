"""The two towers of the emoji reward: a small convolutional network on images, a byte-level transformer on prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 64  # pixels per side; other sizes are resized to it
MAX_BYTES = 96  # of a prompt in UTF-8; the dataset's longest has 60


class EmojiRewardNet(nn.Module):
    """The cosine of an image and a prompt in a shared space.

    Another architecture than the classifier's: overlapping patches, SiLU, which is smooth, and mean and largest value in
    the end. Kernels are multiples of the strides, so that the gradient reaches all pixels equally, without a
    checkerboard.
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
        self.bytes = nn.Embedding(256, text_width)
        self.positions = nn.Parameter(0.02 * torch.randn(MAX_BYTES, text_width))
        layer = nn.TransformerEncoderLayer(
            text_width, 4, 2 * text_width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.text_body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.text_head = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
        self.log_scale = nn.Parameter(torch.tensor(14.0).log())  # of the contrastive loss

    def image(self, images: Tensor) -> Tensor:
        """Images [N, 3, 64, 64] in [0, 1] -> unit vectors [N, width]."""
        hidden = self.image_body((images * 2 - 1).contiguous(memory_format=torch.channels_last))
        pooled = torch.cat([hidden.mean((2, 3)), hidden.amax((2, 3))], dim=1).float()
        return F.normalize(self.image_head(pooled), dim=-1)

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> unit vectors [N, width]; beyond MAX_BYTES a prompt is cut."""
        device = self.positions.device
        with torch.autocast(device.type, enabled=False):  # slower in bf16 at these sizes
            return F.normalize(self.text_head(self._pooled_text(prompts, device)), dim=-1)

    def _pooled_text(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        encoded = [list(prompt.encode()[:MAX_BYTES]) or [0] for prompt in prompts]
        length = max(len(one) for one in encoded)
        ids = torch.tensor([one + [0] * (length - len(one)) for one in encoded], device=device)
        lengths = torch.tensor([len(one) for one in encoded], device=device)
        padded = torch.arange(length, device=device) >= lengths[:, None]
        hidden = self.text_body(self.bytes(ids) + self.positions[:length], src_key_padding_mask=padded)
        kept = (~padded)[..., None].to(hidden.dtype)
        return (hidden * kept).sum(1) / kept.sum(1)


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(4, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.norm(self.first(x))))
