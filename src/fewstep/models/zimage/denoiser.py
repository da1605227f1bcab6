"""Z-Image's transformer as a denoiser: batched, and without the work that repeats.

The modules and weights are diffusers' ``ZImageTransformer2DModel``; only the order of the work is ours. diffusers goes
through a batch sample by sample to cut patches, pad and join image and caption; here a whole group of samples of equal
padded caption length runs as one tensor, which needs no attention mask, and rotations are made once a shape. The
results are the same to rounding (a test holds them to 1e-5).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZImageTransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.precision import without_autocast
from fewstep.errors import UserError

#: block, x [B, L, D], rotations, condition [B, D'] or None -> [B, L, D].
BlockFn = Callable[[ZImageTransformerBlock, Tensor, Tensor, Tensor | None], Tensor]

#: A block -> a maker of contexts in which the block is again what it is now.
AsNow = Callable[[nn.Module], Callable[[], AbstractContextManager[None]]]

#: Rows of a batch with captions of one padded length (None: all of them), their prompts, and that length.
Group = tuple[list[int] | None, EncodedPrompts, int]

#: x, sigma, prompts, padded caption length -> a tensor of as many samples.
Run = Callable[[Tensor, Tensor, EncodedPrompts, int], Tensor]

RECOMPILE_LIMIT = 64  # of the compiled block
PATCH = 2
PATCH_KEY = f"{PATCH}-1"


def pad_to_multiple(length: int) -> int:
    """The next multiple of 32: both token kinds are filled up to it with learned pad tokens that are attended to."""
    return -(-length // SEQ_MULTI_OF) * SEQ_MULTI_OF


@lru_cache(maxsize=64)
def rope_freqs(
    axes: tuple[int, ...], theta: float, caption: int, rows: int, columns: int, device: torch.device
) -> Tensor:
    """Every token's rotations as cosines and sines, [L, 1, 2, head_dim / 2]: the image's first, then the caption's.

    Caption token i sits at (1 + i, 0, 0), the patch at row r and column c at (caption + 1, r, c), image padding at
    (0, 0, 0).
    """
    grid = torch.cartesian_prod(torch.tensor([caption + 1]), torch.arange(rows), torch.arange(columns))
    image = F.pad(grid, (0, 0, 0, pad_to_multiple(len(grid)) - len(grid)))
    text = F.pad(torch.arange(1, caption + 1)[:, None], (0, 2))
    positions = torch.cat([image, text]).double()
    angles = []
    for axis, dim in enumerate(axes):
        frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append((positions[:, axis, None] * frequency).float())
    angle = torch.cat(angles, dim=-1)[:, None, :]
    return torch.stack([angle.cos(), angle.sin()], dim=-2).to(device)


def apply_rope(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn neighbouring pairs of [B, L, heads, head_dim], in fp32."""
    # real arithmetic: complex products are slower, and the compiler leaves them alone
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotations.unbind(-2)
    return torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1).flatten(-2).type_as(x)


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """In the precision of ``x``, whose sum of squares the kernel takes in fp32 anyway."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    # CUDA's autocast would give fp32 back, and everything between two products would take twice the memory and time
    with without_autocast(x.device):
        return F.rms_norm(x, weight.shape, weight.type_as(x), norm.eps)  # type: ignore[arg-type]


def attention_fn(query: Tensor, key: Tensor, value: Tensor, backend: str | None = None) -> Tensor:
    """Softmax attention over [B, L, heads, head_dim], by one of diffusers' backends; None is the one it is set to."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # there the fused kernel's backward is so slow that a training step takes half as long again
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return (scores.softmax(dim=-1).type_as(value) @ value).transpose(1, 2)
    return dispatch_attention_fn(query, key, value, backend=backend)


def self_attention(attention: Attention, x: Tensor, rotations: Tensor) -> Tensor:
    """Self-attention of one block, over all tokens of [B, L, D]."""
    projections = (attention.to_q, attention.to_k, attention.to_v)
    query, key, value = (project(x).unflatten(-1, (attention.heads, -1)) for project in projections)
    query, key = (
        apply_rope(rms_norm(t, n), rotations) for t, n in ((query, attention.norm_q), (key, attention.norm_k))
    )
    mixed = attention_fn(query, key, value, attention.processor._attention_backend)
    return attention.to_out[0](mixed.flatten(2))


def run_block(block: ZImageTransformerBlock, x: Tensor, rotations: Tensor, condition: Tensor | None) -> Tensor:
    """One transformer block on [B, L, D]; ``condition`` [B, D'] modulates, None for the caption's blocks."""
    if condition is None:
        x = x + rms_norm(
            self_attention(block.attention, rms_norm(x, block.attention_norm1), rotations), block.attention_norm2
        )
        return x + rms_norm(block.feed_forward(rms_norm(x, block.ffn_norm1)), block.ffn_norm2)
    scale_msa, gate_msa, scale_mlp, gate_mlp = block.adaLN_modulation(condition).unsqueeze(1).chunk(4, dim=2)
    attended = self_attention(block.attention, rms_norm(x, block.attention_norm1) * (1 + scale_msa), rotations)
    x = x + gate_msa.tanh() * rms_norm(attended, block.attention_norm2)
    fed = block.feed_forward(rms_norm(x, block.ffn_norm1) * (1 + scale_mlp))
    return x + gate_mlp.tanh() * rms_norm(fed, block.ffn_norm2)


def get_blocks(transformer: Any) -> list[nn.Module]:
    """What is sharded, gathered and offloaded as a piece."""
    return [*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers]


class ZImageDenoiser(nn.Module):
    """``denoiser(x, sigma, prompts) -> velocity`` around diffusers' transformer.

    Here alone Z-Image's signs are turned: it takes ``1 - sigma`` and returns ``-velocity``.
    """

    def __init__(self, transformer: ZImageTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.run_block: BlockFn = run_block
        self._groups: dict[int, tuple[EncodedPrompts, list[Group]]] | None = None
        self._captions: dict[int, Tensor] = {}

    @contextmanager
    def cache_text_tokens(self) -> Iterator[None]:
        """Inside, what depends on the prompts alone is computed once for each batch of them, and used at every step.
        For sampling: weights must stay as they are, and no gradient reaches the caption's blocks."""
        self._groups = {}
        try:
            yield
        finally:
            self._groups = None
            self._captions.clear()

    def enable_gradient_checkpointing(self, as_now: AsNow = lambda block: nullcontext) -> None:
        """Keep only each block's input for the backward pass, and run the block again there: memory for time.

        Args:
            as_now: a block -> what makes a context in which it is again what it is now; for blocks that change between
                one run and the other.
        """
        compute = self.run_block

        def run(block: ZImageTransformerBlock, x: Tensor, rotations: Tensor, condition: Tensor | None) -> Tensor:
            if not torch.is_grad_enabled():
                return compute(block, x, rotations, condition)
            again = as_now(block)
            contexts = lambda: (nullcontext(), again())  # noqa: E731
            # nothing in a block is random
            return checkpoint(
                *(compute, block, x, rotations, condition),
                use_reentrant=False,
                context_fn=contexts,
                preserve_rng_state=False,
            )

        self.run_block = run

    def compile_repeated_blocks(self) -> None:
        """Compile the transformer block, once for each shape: half a minute first, then about 1.3 times the speed.

        Raises:
            UserError: on a CPU without a C++ compiler.
        """
        compiler = os.environ.get("CXX", "g++")
        if next(self.parameters()).device.type == "cpu" and shutil.which(compiler) is None:
            raise UserError(
                f"compile: needs a C++ compiler, and there is no {compiler}; install one, or set compile=false"
            )
        # with LoRA roles on one base: each role, with gradient and without, at each shape; beyond the limit the
        # compiler would give up without an error, and the fake would speak uncompiled
        from torch._dynamo import config

        config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
        self.run_block = torch.compile(run_block, dynamic=False)

    def forward(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        """x [B, C, H, W] with even H and W, sigma [B], B prompts -> velocity [B, C, H, W] in fp32."""
        return self._grouped(self._velocity, x, sigma, prompts)

    def forward_multi_resolution(
        self, samples: Sequence[Tensor], sigma: Tensor, prompts: EncodedPrompts
    ) -> list[Tensor]:
        """As ``forward`` for samples [C, H, W] of several sizes, of which each size runs as one batch."""
        sizes: dict[torch.Size, list[int]] = {}
        for row, sample in enumerate(samples):
            sizes.setdefault(sample.shape, []).append(row)
        velocities = dict[int, Tensor]()
        for rows in sizes.values():
            each = self(torch.stack([samples[row] for row in rows]), sigma[rows], prompts[rows])
            velocities |= dict(zip(rows, each, strict=True))
        return [velocities[row] for row in range(len(samples))]

    def features(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        """What the middle layer makes of the image: [B, H/2 * W/2, D] in fp32. Arguments as for the velocity."""
        return self._grouped(self._middle, x, sigma, prompts)

    def _grouped(self, run: Run, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        """``run`` on each group of samples whose captions are padded to the same length, put together again."""
        parts, order = list[Tensor](), list[int]()
        for rows, some, caption in self._grouping(prompts):
            if rows is None:
                return run(x, sigma, some, caption)
            parts.append(run(x[rows], sigma[rows], some, caption))
            order += rows
        return torch.cat(parts)[torch.tensor(order, device=x.device).argsort()]

    def _grouping(self, prompts: EncodedPrompts) -> list[Group]:
        """The samples in groups of equal padded caption length."""
        if self._groups is not None and id(prompts) in self._groups:
            return self._groups[id(prompts)][1]
        rows: dict[int, list[int]] = {}
        for index, length in enumerate(prompts.lengths.tolist()):
            rows.setdefault(pad_to_multiple(length), []).append(index)
        if len(rows) == 1:
            groups: list[Group] = [(None, prompts, next(iter(rows)))]
        else:
            groups = [(some, prompts[some], caption) for caption, some in rows.items()]
        if self._groups is not None:
            self._groups[id(prompts)] = (prompts, groups)  # with the prompts, whose id would otherwise be given away
        return groups

    def _velocity(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts, caption: int) -> Tensor:
        batch, channels, height, width = x.shape
        rows, columns = height // PATCH, width // PATCH
        joined, time = self._through(len(self.transformer.layers), x, sigma, prompts, caption)
        final = self.transformer.all_final_layer[PATCH_KEY](joined[:, : rows * columns], c=time)
        output = final.reshape(batch, rows, columns, PATCH, PATCH, channels).permute(0, 5, 1, 3, 2, 4)
        return -output.reshape(batch, channels, height, width).float()

    def _middle(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts, caption: int) -> Tensor:
        joined, _ = self._through(-(-len(self.transformer.layers) // 2), x, sigma, prompts, caption)
        return joined[:, : x.shape[2] * x.shape[3] // PATCH**2].float()

    def _through(
        self, depth: int, x: Tensor, sigma: Tensor, prompts: EncodedPrompts, caption: int
    ) -> tuple[Tensor, Tensor]:
        """Image and caption tokens [B, L, D] after the first ``depth`` layers, and what modulates them [B, D']."""
        model = self.transformer
        batch, channels, height, width = x.shape
        rows, columns = height // PATCH, width // PATCH
        rotations = rope_freqs(tuple(model.axes_dims), model.rope_theta, caption, rows, columns, x.device)
        dtype = model.dtype

        time = model.t_embedder((1 - sigma) * model.t_scale).to(dtype)
        patches = x.to(dtype).reshape(batch, channels, rows, PATCH, columns, PATCH)
        patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
        image = model.all_x_embedder[PATCH_KEY](patches)
        tokens = pad_to_multiple(rows * columns)
        if tokens > rows * columns:
            pad = model.x_pad_token.expand(batch, tokens - rows * columns, -1)
            image = torch.cat([image, pad.type_as(image)], dim=1)
        for block in model.noise_refiner:
            image = self.run_block(block, image, rotations[:tokens], time)

        joined = torch.cat([image, self._caption(prompts, caption, rotations[tokens:]).type_as(image)], dim=1)
        for block in model.layers[:depth]:
            joined = self.run_block(block, joined, rotations, time)
        return joined, time

    def _caption(self, prompts: EncodedPrompts, caption: int, rotations: Tensor) -> Tensor:
        """The caption's tokens [B, caption, D] after its own blocks."""
        if self._groups is not None and not torch.is_grad_enabled():
            if id(prompts) not in self._captions:
                self._captions[id(prompts)] = self._caption_blocks(prompts, caption, rotations)
            return self._captions[id(prompts)]
        return self._caption_blocks(prompts, caption, rotations)

    def _caption_blocks(self, prompts: EncodedPrompts, caption: int, rotations: Tensor) -> Tensor:
        model = self.transformer
        features = prompts.features[:, :caption].to(model.dtype)
        features = F.pad(features, (0, 0, 0, caption - features.shape[1]))
        embedded = model.cap_embedder(features)
        real = torch.arange(caption, device=features.device) < prompts.lengths.to(features.device)[:, None]
        text = torch.where(real[..., None], embedded, model.cap_pad_token.type_as(embedded))
        for block in model.context_refiner:
            text = self.run_block(block, text, rotations, None)
        return text
