"""SD3's transformer as a denoiser: diffusers' modules and their arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import MIDDLE
from fewstep.models.denoiser import TransformerDenoiser
from fewstep.models.diffusers_block import replace_blocks

TIMESTEPS = 1000  # the transformer takes sigma times this


class SD3Denoiser(TransformerDenoiser):
    """``denoiser(x, sigma, prompts) -> velocity`` around diffusers' transformer, whose output is the velocity.

    The first row of a prompt's features begins with the pooled vector (``prompts.SD3PromptEncoder``).
    """

    transformer: SD3Transformer2DModel

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        super().__init__(transformer)
        replace_blocks(transformer.transformer_blocks)

    def forward(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        """x [B, C, H, W] with even H and W, sigma [B], B prompts -> velocity [B, C, H, W] in fp32."""
        model = self.transformer
        (image,), temb = self._image_tokens([len(model.transformer_blocks)], x, sigma, prompts)
        patch, (height, width) = model.config["patch_size"], x.shape[2:]
        output = model.proj_out(model.norm_out(image, temb)).unflatten(2, (patch, patch, -1))
        output = output.unflatten(1, (height // patch, width // patch)).permute(0, 5, 1, 3, 2, 4)
        return output.reshape(x.shape).float()

    @property
    def feature_dim(self) -> int:
        return int(self.transformer.inner_dim)

    def features(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts, depths: Sequence[float] = MIDDLE) -> Tensor:
        """Features of the image tokens after some layers: [B, H/2 * W/2, len(depths) D] in fp32."""
        counts = [math.ceil(depth * len(self.transformer.transformer_blocks)) for depth in depths]
        return torch.cat(self._image_tokens(counts, x, sigma, prompts)[0], dim=-1).float()

    def _image_tokens(
        self, counts: Sequence[int], x: Tensor, sigma: Tensor, prompts: EncodedPrompts
    ) -> tuple[list[Tensor], Tensor]:
        """Image tokens [B, L, D] after each of ``counts`` layers, and the embedded sigma and pooled vector [B, D]."""
        model = self.transformer
        features = prompts.features.to(model.dtype)
        temb = model.time_text_embed(sigma * TIMESTEPS, features[:, 0, : model.config["pooled_projection_dim"]])
        image, text = model.pos_embed(x.to(model.dtype)).contiguous(), model.context_embedder(features[:, 1:])
        after = []
        for count, block in enumerate(model.transformer_blocks[: counts[-1]], 1):
            text, image = block(image, text, temb)
            after += [image] * counts.count(count)
        return after, temb
