"""Wan's transformer as a denoiser: diffusers' modules and their arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.nn import functional as F

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import MIDDLE
from fewstep.models.denoiser import TransformerDenoiser
from fewstep.models.diffusers_block import replace_blocks
from fewstep.models.wan.prompts import TOKENS

TIMESTEPS = 1000  # the transformer takes sigma times this


class WanDenoiser(TransformerDenoiser):
    """``denoiser(x, sigma, prompts) -> velocity`` around diffusers' transformer, whose output is the velocity.

    It attends to 512 tokens of every prompt, those after its end being zeros.
    """

    transformer: WanTransformer3DModel
    can_split_tokens = True

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        super().__init__(transformer)
        replace_blocks(transformer.blocks)

    def forward(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        """x [B, C, F, H, W] with even H and W, sigma [B], B prompts -> velocity [B, C, F, H, W] in fp32."""
        model = self.transformer
        (video,), temb = self._video_tokens([len(model.blocks)], x, sigma, prompts)
        shift, scale = (model.scale_shift_table + temb[:, None]).chunk(2, dim=1)
        output = model.proj_out((model.norm_out(video.float()) * (1 + scale) + shift).type_as(video))
        (_, patch, _), (frames, height, width) = model.config["patch_size"], x.shape[2:]
        output = output.unflatten(2, (patch, patch, -1))
        output = output.unflatten(1, (frames, height // patch, width // patch)).permute(0, 6, 1, 2, 4, 3, 5)
        return output.reshape(x.shape).float()

    @property
    def feature_dim(self) -> int:
        return int(self.transformer.config["num_attention_heads"] * self.transformer.config["attention_head_dim"])

    def features(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts, depths: Sequence[float] = MIDDLE) -> Tensor:
        """Features of the video's tokens after some layers: [B, F * H/2 * W/2, len(depths) D] in fp32."""
        counts = [math.ceil(depth * len(self.transformer.blocks)) for depth in depths]
        return torch.cat(self._video_tokens(counts, x, sigma, prompts)[0], dim=-1).float()

    def _video_tokens(
        self, counts: Sequence[int], x: Tensor, sigma: Tensor, prompts: EncodedPrompts
    ) -> tuple[list[Tensor], Tensor]:
        """The video's tokens [B, L, D] after each of ``counts`` layers, and the embedded sigma [B, D]."""
        model, context = self.transformer, self.context_parallel
        rotary = tuple(part.to(x.device) for part in model.rope(x))  # on the CPU where weights are on the meta device
        text = F.pad(prompts.features, (0, 0, 0, TOKENS - prompts.features.shape[1])).to(model.dtype)
        temb, modulation, text, _ = model.condition_embedder(sigma * TIMESTEPS, text)
        modulation = modulation.unflatten(1, (6, -1))
        video = model.patch_embedding(x.to(model.dtype)).flatten(2).transpose(1, 2).contiguous()
        if context is not None:
            video, rotary = context.split(video), tuple(context.split(part) for part in rotary)
        after = []
        for count, block in enumerate(model.blocks[: counts[-1]], 1):
            video = block(video, text, modulation, rotary)
            if count in counts:
                whole = video if context is None else context.join(video)
                after += [whole] * counts.count(count)
        return after, temb
