"""SD3's transformer as a denoiser: diffusers' modules and their arithmetic."""

from __future__ import annotations

from diffusers import SD3Transformer2DModel
from torch import Tensor

from fewstep.core.conditioning import EncodedPrompts
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
        image, temb = self._image_tokens(len(model.transformer_blocks), x, sigma, prompts)
        patch, (height, width) = model.config["patch_size"], x.shape[2:]
        output = model.proj_out(model.norm_out(image, temb)).unflatten(2, (patch, patch, -1))
        output = output.unflatten(1, (height // patch, width // patch)).permute(0, 5, 1, 3, 2, 4)
        return output.reshape(x.shape).float()

    @property
    def feature_dim(self) -> int:
        return int(self.transformer.inner_dim)

    def features(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        """Features of the image tokens after the middle layer: [B, H/2 * W/2, D] in fp32."""
        return self._image_tokens(-(-len(self.transformer.transformer_blocks) // 2), x, sigma, prompts)[0].float()

    def _image_tokens(self, depth: int, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> tuple[Tensor, Tensor]:
        """Image tokens [B, L, D] after the first ``depth`` layers, and the embedded sigma and pooled vector [B, D]."""
        model = self.transformer
        features = prompts.features.to(model.dtype)
        temb = model.time_text_embed(sigma * TIMESTEPS, features[:, 0, : model.config["pooled_projection_dim"]])
        image, text = model.pos_embed(x.to(model.dtype)).contiguous(), model.context_embedder(features[:, 1:])
        for block in model.transformer_blocks[:depth]:
            text, image = block(image, text, temb)
        return image, temb
