"""Lumina 2's transformer as a batched denoiser.

The modules and their arithmetic are those of diffusers' ``Lumina2Transformer2DModel``. Its forward joins caption and
image sample by sample; here the caption follows the image in all samples, so that no loop over samples is needed and
nothing is read back from a GPU. Attention does not depend on the order of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import Lumina2Transformer2DModel
from torch import Tensor

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import MIDDLE
from fewstep.models.denoiser import TransformerDenoiser
from fewstep.models.diffusers_block import replace_blocks
from fewstep.models.lumina2.rope import rope_freqs


class Lumina2Denoiser(TransformerDenoiser):
    """``denoiser(x, sigma, prompts) -> velocity`` around diffusers' transformer.

    The only place that converts Lumina's signs: the transformer takes ``1 - sigma`` and returns ``-velocity``.
    """

    transformer: Lumina2Transformer2DModel

    def __init__(self, transformer: Lumina2Transformer2DModel) -> None:
        super().__init__(transformer)
        replace_blocks(transformer.noise_refiner, transformer.context_refiner, transformer.layers)

    def forward(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        """x [B, C, H, W] with even H and W, sigma [B], B prompts -> velocity [B, C, H, W] in fp32."""
        model = self.transformer
        (image,), temb = self._image_tokens([len(model.layers)], x, sigma, prompts)
        patch, (height, width) = model.config["patch_size"], x.shape[2:]
        output = model.norm_out(image, temb).unflatten(2, (patch, patch, -1))
        output = output.unflatten(1, (height // patch, width // patch)).permute(0, 5, 1, 3, 2, 4)
        return -output.reshape(x.shape).float()

    @property
    def feature_dim(self) -> int:
        return int(self.transformer.config["hidden_size"])

    def features(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts, depths: Sequence[float] = MIDDLE) -> Tensor:
        """Features of the image tokens after some layers: [B, H/2 * W/2, len(depths) D] in fp32."""
        counts = [math.ceil(depth * len(self.transformer.layers)) for depth in depths]
        return torch.cat(self._image_tokens(counts, x, sigma, prompts)[0], dim=-1).float()

    def _image_tokens(
        self, counts: Sequence[int], x: Tensor, sigma: Tensor, prompts: EncodedPrompts
    ) -> tuple[list[Tensor], Tensor]:
        """Image tokens [B, L, D] after each of ``counts`` layers, and the embedded sigma [B, D']."""
        model = self.transformer
        batch, channels, height, width = x.shape
        patch, lengths = model.config["patch_size"], tuple(prompts.lengths.tolist())
        rows, columns, longest = height // patch, width // patch, max(lengths)
        patches = x.to(model.dtype).reshape(batch, channels, rows, patch, columns, patch)
        patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
        features = prompts.features[:, :longest].to(model.dtype)
        temb, text = model.time_caption_embed(patches, 1 - sigma, features)
        rope = model.rope_embedder
        freqs = rope_freqs(tuple(rope.axes_dim), rope.theta, lengths, rows, columns, x.device)

        mask = None  # of the tokens that are attended to; samples of one length need none
        if len(set(lengths)) > 1:
            used = torch.arange(longest) < prompts.lengths[:, None]
            mask = torch.cat([used.new_ones(batch, rows * columns), used], dim=1).to(x.device, non_blocking=True)
        image, tokens = model.x_embedder(patches), rows * columns
        for block in model.context_refiner:
            text = block(text, None if mask is None else mask[:, tokens:], freqs[:, tokens:])
        for block in model.noise_refiner:
            image = block(image, None, freqs[:, :tokens], temb)
        joined = torch.cat([image, text], dim=1)
        after = []
        for count, block in enumerate(model.layers[: counts[-1]], 1):
            joined = block(joined, mask, freqs, temb)
            after += [joined[:, :tokens]] * counts.count(count)
        return after, temb
