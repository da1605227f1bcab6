"""FLUX.2's transformer as a denoiser: diffusers' modules and their arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import MIDDLE
from fewstep.models.denoiser import TransformerDenoiser
from fewstep.models.diffusers_block import replace_blocks

TIMESTEPS = 1000  # the transformer's embedding takes sigma times this


class Flux2Denoiser(TransformerDenoiser):
    """``denoiser(x, sigma, prompts) -> velocity`` around diffusers' transformer, whose output is the velocity.

    The latents are diffusers' after packing: one token for each of their pixels. All prompts have as many tokens.
    """

    transformer: Flux2Transformer2DModel
    can_split_tokens = True

    def __init__(self, transformer: Flux2Transformer2DModel) -> None:
        super().__init__(transformer)
        replace_blocks(transformer.transformer_blocks, transformer.single_transformer_blocks)

    @property
    def layers(self) -> int:
        return len(self.transformer.transformer_blocks) + len(self.transformer.single_transformer_blocks)

    def forward(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        """x [B, C, H, W], sigma [B], B prompts -> velocity [B, C, H, W] in fp32."""
        model = self.transformer
        (image,), temb = self._image_tokens([self.layers], x, sigma, prompts)
        output = model.proj_out(model.norm_out(image, temb))
        return output.transpose(1, 2).reshape(x.shape).float()

    @property
    def feature_dim(self) -> int:
        return int(self.transformer.inner_dim)

    def features(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts, depths: Sequence[float] = MIDDLE) -> Tensor:
        """Features of the image tokens after some layers: [B, H * W, len(depths) D] in fp32."""
        counts = [math.ceil(depth * self.layers) for depth in depths]
        return torch.cat(self._image_tokens(counts, x, sigma, prompts)[0], dim=-1).float()

    def _image_tokens(
        self, counts: Sequence[int], x: Tensor, sigma: Tensor, prompts: EncodedPrompts
    ) -> tuple[list[Tensor], Tensor]:
        """Image tokens [B, L, D] after each of ``counts`` layers, and the embedded sigma [B, D]."""
        model, context, after = self.transformer, self.context_parallel, list[Tensor]()
        temb = model.time_guidance_embed(sigma.to(model.dtype) * TIMESTEPS, None)
        of_image, of_text = model.double_stream_modulation_img(temb), model.double_stream_modulation_txt(temb)
        of_both = model.single_stream_modulation(temb)
        image = model.x_embedder(x.to(model.dtype).flatten(2).transpose(1, 2))
        text = model.context_embedder(prompts.features.to(model.dtype))
        places = positions(text.shape[1], x.shape[2], x.shape[3], x.device)
        if context is not None:
            parts = (context.split(part, 0) for part in (places[: text.shape[1]], places[text.shape[1] :]))
            text, image, places = context.split(text), context.split(image), torch.cat(list(parts))
        tokens, rotary = text.shape[1], model.pos_embed(places)

        def keep(image: Tensor, count: int) -> None:
            if count in counts:
                whole = image if context is None else context.join(image)
                after.extend([whole] * counts.count(count))

        for count, block in enumerate(model.transformer_blocks[: counts[-1]], 1):
            text, image = block(image, text, of_image, of_text, rotary)
            keep(image, count)
        both, first = torch.cat([text, image], dim=1), len(model.transformer_blocks)
        for count, block in enumerate(model.single_transformer_blocks[: max(counts[-1] - first, 0)], first + 1):
            both = block(both, None, of_both, rotary)
            keep(both[:, tokens:], count)
        return after, temb


def positions(tokens: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Of the prompt's tokens, then of the image's: [tokens + rows * columns, 4]; the axes are time, row, column, and
    place in the prompt."""
    text = torch.zeros(tokens, 4, dtype=torch.long, device=device)
    text[:, 3] = torch.arange(tokens, device=device)
    image = torch.zeros(rows, columns, 4, dtype=torch.long, device=device)
    image[..., 1] = torch.arange(rows, device=device)[:, None]
    image[..., 2] = torch.arange(columns, device=device)
    return torch.cat([text, image.flatten(0, 1)])
