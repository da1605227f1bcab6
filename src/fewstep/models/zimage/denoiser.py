"""Z-Image's transformer as a batched denoiser.

The weights and most modules are those of diffusers' ``ZImageTransformer2DModel``; the order of the work differs.
diffusers processes a batch sample by sample to cut patches, pad, and join image and caption; here all samples with the
same padded caption length run as one tensor, which needs no attention mask, and rotary frequencies are computed once
for each shape. Results agree to 1e-5 (tests/test_zimage.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor, nn

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import MIDDLE
from fewstep.models.denoiser import TransformerDenoiser
from fewstep.models.text import MAX_TOKENS
from fewstep.models.zimage.block import use_fewstep_blocks
from fewstep.models.zimage.rope import pad_to_multiple, rope_freqs

PATCH_SIZE = 2
PATCH_KEY = f"{PATCH_SIZE}-1"

#: Rows of a batch whose captions have one padded length (None: all rows), their prompts, and that length.
CaptionGroup = tuple[list[int] | None, EncodedPrompts, int]

#: x, sigma, prompts, padded caption length -> a tensor with as many rows.
GroupFn = Callable[[Tensor, Tensor, EncodedPrompts, int], Tensor]


class ZImageDenoiser(TransformerDenoiser):
    """``denoiser(x, sigma, prompts) -> velocity`` around diffusers' transformer.

    The only place that converts Z-Image's signs: the transformer takes ``1 - sigma`` and returns ``-velocity``.
    """

    transformer: ZImageTransformer2DModel
    can_reuse_layers = True
    can_split_tokens = True

    def __init__(self, transformer: ZImageTransformer2DModel) -> None:
        super().__init__(transformer)
        use_fewstep_blocks(transformer)
        self._groups: dict[int, tuple[EncodedPrompts, list[CaptionGroup]]] | None = None
        self._text_tokens: dict[int, Tensor] = {}

    @contextmanager
    def cache_text_tokens(self) -> Iterator[None]:
        self._groups = {}
        try:
            yield
        finally:
            self._groups = None
            self._text_tokens.clear()

    def forward(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        """x [B, C, H, W] with even H and W, sigma [B], B prompts -> velocity [B, C, H, W] in fp32."""
        return self._by_caption_length(self._velocity, x, sigma, prompts)

    def forward_multi_resolution(
        self, samples: Sequence[Tensor], sigma: Tensor, prompts: EncodedPrompts
    ) -> list[Tensor]:
        """``forward`` for samples [C, H, W] of several sizes; samples of one size run as one batch."""
        sizes: dict[torch.Size, list[int]] = {}
        for row, sample in enumerate(samples):
            sizes.setdefault(sample.shape, []).append(row)
        velocities = dict[int, Tensor]()
        for rows in sizes.values():
            each = self(torch.stack([samples[row] for row in rows]), sigma[rows], prompts[rows])
            velocities |= dict(zip(rows, each, strict=True))
        return [velocities[row] for row in range(len(samples))]

    @property
    def feature_dim(self) -> int:
        return int(self.transformer.config["dim"])

    @property
    def heads(self) -> int:
        return int(self.transformer.config["n_heads"])

    @property
    def split_modules(self) -> nn.Module:
        return self.transformer.layers  # the refiners compute all tokens

    def features(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts, depths: Sequence[float] = MIDDLE) -> Tensor:
        """Features of the image tokens after some layers: [B, H/2 * W/2, len(depths) D] in fp32."""
        return self._by_caption_length(partial(self._block_features, depths), x, sigma, prompts)

    def _by_caption_length(self, run: GroupFn, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        """Apply ``run`` to each group of samples with the same padded caption length; rows keep their order."""
        parts, order = list[Tensor](), list[int]()
        for rows, group, caption in self._caption_groups(prompts):
            if rows is None:
                return run(x, sigma, group, caption)
            parts.append(run(x[rows], sigma[rows], group, caption))
            order += rows
        return torch.cat(parts)[torch.tensor(order, device=x.device).argsort()]

    def _caption_groups(self, prompts: EncodedPrompts) -> list[CaptionGroup]:
        """The samples in groups of equal padded caption length."""
        if self._groups is not None and id(prompts) in self._groups:
            return self._groups[id(prompts)][1]
        rows: dict[int, list[int]] = {}
        for index, length in enumerate(prompts.lengths.tolist()):
            rows.setdefault(pad_to_multiple(length), []).append(index)
        if len(rows) == 1:
            groups: list[CaptionGroup] = [(None, prompts, next(iter(rows)))]
        else:
            groups = [(group, prompts[group], caption) for caption, group in rows.items()]
        if self._groups is not None:
            self._groups[id(prompts)] = (prompts, groups)  # keeps the prompts alive, whose id could be reused otherwise
        return groups

    def _velocity(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts, caption: int) -> Tensor:
        freqs = self._rope_freqs(x, caption)
        text = self._cached_text(prompts, caption, freqs[-caption:])
        if self.ahead_of_time is not None:
            return self.ahead_of_time(x, sigma, text, freqs)
        return self.velocity_from_text(x, sigma, text, freqs, id(prompts))

    def velocity_from_text(
        self, x: Tensor, sigma: Tensor, text: Tensor, freqs: Tensor, key: int | None = None
    ) -> Tensor:
        """See the base class.

        Args:
            key: of the samples in the layer cache.
        """
        joined, adaln_cond = self._join(x, sigma, text, freqs)
        context = self.context_parallel
        if context is not None:
            joined, freqs = context.split(joined), context.split(freqs, 0)

        def run(tokens: Tensor, layers: slice, rows: Tensor | None) -> Tensor:
            cond = adaln_cond if rows is None else adaln_cond[rows]
            for block in self.transformer.layers[layers]:
                tokens = block(tokens, freqs, cond)
            return tokens

        if self.layer_cache is None:
            joined = run(joined, slice(None), None)
        else:
            joined = self.layer_cache(key, joined, sigma, run)
        if context is not None:
            joined = context.join(joined)
        return self._read_velocity(joined, adaln_cond, x)

    def graph_example(self, batch: int, shape: Sequence[int]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        from torch.export import Dim  # takes time to import

        caption = 2 * SEQ_MULTI_OF
        weight = next(self.transformer.parameters())
        x = torch.zeros(batch, *shape, device=weight.device)
        freqs = self._rope_freqs(x, caption)
        text = torch.zeros(batch, caption, self.feature_dim, device=weight.device, dtype=weight.dtype)
        blocks = Dim("caption_blocks", min=1, max=MAX_TOKENS // SEQ_MULTI_OF)
        dynamic = (None, None, {1: SEQ_MULTI_OF * blocks}, {0: SEQ_MULTI_OF * blocks + (len(freqs) - caption)})
        return (x, torch.full((batch,), 0.5, device=weight.device), text, freqs), dynamic

    def _read_velocity(self, joined: Tensor, adaln_cond: Tensor, x: Tensor) -> Tensor:
        """The velocity [B, C, H, W] in fp32 from the tokens [B, L, D] after all layers."""
        batch, channels, height, width = x.shape
        rows, columns = height // PATCH_SIZE, width // PATCH_SIZE
        final = self.transformer.all_final_layer[PATCH_KEY](joined[:, : rows * columns], c=adaln_cond)
        output = final.reshape(batch, rows, columns, PATCH_SIZE, PATCH_SIZE, channels).permute(0, 5, 1, 3, 2, 4)
        return -output.reshape(batch, channels, height, width).float()

    def _block_features(
        self, depths: Sequence[float], x: Tensor, sigma: Tensor, prompts: EncodedPrompts, caption: int
    ) -> Tensor:
        counts = [math.ceil(depth * len(self.transformer.layers)) for depth in depths]
        freqs = self._rope_freqs(x, caption)
        joined, adaln_cond = self._join(x, sigma, self._cached_text(prompts, caption, freqs[-caption:]), freqs)
        tokens, context = x.shape[2] * x.shape[3] // PATCH_SIZE**2, self.context_parallel
        if context is not None:
            joined, freqs = context.split(joined), context.split(freqs, 0)
        after: dict[int, Tensor] = {}
        for number, block in enumerate(self.transformer.layers[: max(counts)], start=1):
            joined = block(joined, freqs, adaln_cond)
            if number in counts:
                whole = joined if context is None else context.join(joined)
                after[number] = whole[:, :tokens].float()
        return torch.cat([after[count] for count in counts], dim=-1)

    def _rope_freqs(self, x: Tensor, caption: int) -> Tensor:
        """Of all tokens, those of the caption last."""
        model, (rows, columns) = self.transformer, (side // PATCH_SIZE for side in x.shape[2:])
        return rope_freqs(tuple(model.axes_dims), model.rope_theta, caption, rows, columns, x.device)

    def _join(self, x: Tensor, sigma: Tensor, text: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
        """Image and caption tokens [B, L, D] before the layers, and the embedded sigma [B, D'].

        Args:
            text: caption tokens after the context refiner.
        """
        model = self.transformer
        batch, channels, height, width = x.shape
        rows, columns = height // PATCH_SIZE, width // PATCH_SIZE
        dtype = model.dtype
        adaln_cond = model.t_embedder((1 - sigma) * model.t_scale).to(dtype)
        patches = x.to(dtype).reshape(batch, channels, rows, PATCH_SIZE, columns, PATCH_SIZE)
        patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
        image = model.all_x_embedder[PATCH_KEY](patches)
        tokens = pad_to_multiple(rows * columns)
        if tokens > rows * columns:
            pad = model.x_pad_token.expand(batch, tokens - rows * columns, -1)
            image = torch.cat([image, pad.type_as(image)], dim=1)
        for block in model.noise_refiner:
            image = block(image, freqs[:tokens], adaln_cond)
        return torch.cat([image, text.type_as(image)], dim=1), adaln_cond

    def _cached_text(self, prompts: EncodedPrompts, caption: int, freqs: Tensor) -> Tensor:
        """:meth:`_text` of these prompts, computed once inside ``cache_text_tokens``."""
        if self._groups is None or torch.is_grad_enabled():
            return self._text(prompts, caption, freqs)
        if id(prompts) not in self._text_tokens:
            self._text_tokens[id(prompts)] = self._text(prompts, caption, freqs)
        return self._text_tokens[id(prompts)]

    def _text(self, prompts: EncodedPrompts, caption: int, freqs: Tensor) -> Tensor:
        """Caption tokens [B, caption, D] after the context refiner."""
        model = self.transformer
        features = prompts.features[:, :caption].to(model.dtype)
        features = F.pad(features, (0, 0, 0, caption - features.shape[1]))
        embedded = model.cap_embedder(features)
        real = torch.arange(caption, device=features.device) < prompts.lengths.to(features.device)[:, None]
        text = torch.where(real[..., None], embedded, model.cap_pad_token.type_as(embedded))
        for block in model.context_refiner:
            text = block(text, freqs, None)
        return text
